"""Rows → rows with their remote images, which are fetched while the rows before them are converted."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable

from batchkit.stocks import Stock, Ware
from batchkit.tasks import Row

AHEAD_IMAGES = 512
AHEAD_ROWS = 4096
AHEAD_BYTES = 64 << 20
"""How far to look ahead: the images themselves wait on the disk, only the rows take memory."""


def with_images(
    rows: Iterable[Row], remote_images: Callable[[Row], list[str]], *, private_hosts: bool
) -> Generator[Row]:
    """The rows in order, each with the remote images that `remote_images` finds in it.

    Raises `BatchkitError` where no image can be had; one that cannot is an error of its row.
    """
    ahead: deque[tuple[Row, dict[str, Ware]]] = deque()
    images = size = 0
    with Stock(private_hosts=private_hosts) as stock:
        for row in rows:
            wares = {uri: stock.take(uri) for uri in remote_images(row)}
            if not wares and not ahead:
                yield row
                continue
            ahead.append((row, wares))
            images, size = images + len(wares), size + row.size
            while ahead and (images > AHEAD_IMAGES or len(ahead) > AHEAD_ROWS or size > AHEAD_BYTES or stock.is_full()):
                first, its = ahead.popleft()
                images, size = images - len(its), size - first.size
                yield _filled(first, its, stock)
        while ahead:
            yield _filled(*ahead.popleft(), stock)


def _filled(row: Row, wares: dict[str, Ware], stock: Stock) -> Row:
    return row._replace(fetched={uri: stock.read(ware) for uri, ware in wares.items()}) if wares else row
