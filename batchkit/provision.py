"""Rows → rows with their remote images, which are fetched while the rows before them are converted."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from typing import TypeVar

from batchkit.stocks import Stock, Ware
from batchkit.tasks import Row

AHEAD_IMAGES = 512
AHEAD_ROWS = 4096
AHEAD_BYTES = 64 << 20
"""How far to look ahead: the images themselves wait on the disk, only the rows take memory."""


T = TypeVar("T")


def with_images(
    rows: Iterable[Row], remote_images: Callable[[Row], list[str]], *, private_hosts: bool
) -> Generator[Row]:
    """The rows in order, each with the remote images that `remote_images` finds in it.

    Raises `BatchkitError` where no image can be had; one that cannot is an error of its row.
    """
    filled = fetched(rows, remote_images, lambda row: row.size, private_hosts=private_hosts)
    with closing(filled):
        for row, found in filled:
            yield row._replace(fetched=found) if found else row


def fetched(
    things: Iterable[T], remote_images: Callable[[T], list[str]], size_of: Callable[[T], int], *, private_hosts: bool
) -> Generator[tuple[T, dict[str, bytes | str]]]:
    """The same of anything that names images: each with the bytes at its addresses, or why they cannot be had."""
    ahead: deque[tuple[T, int, dict[str, Ware]]] = deque()
    images = size = 0
    with Stock(private_hosts=private_hosts) as stock:
        for thing in things:
            wares = {uri: stock.take(uri) for uri in remote_images(thing)}
            if not wares and not ahead:
                yield thing, {}
                continue
            ahead.append((thing, size_of(thing), wares))
            images, size = images + len(wares), size + ahead[-1][1]
            while ahead and (images > AHEAD_IMAGES or len(ahead) > AHEAD_ROWS or size > AHEAD_BYTES or stock.is_full()):
                first, its_size, its = ahead.popleft()
                images, size = images - len(its), size - its_size
                yield first, {uri: stock.read(ware) for uri, ware in its.items()}
        while ahead:
            first, _, its = ahead.popleft()
            yield first, {uri: stock.read(ware) for uri, ware in its.items()}
