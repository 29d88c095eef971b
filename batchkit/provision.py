"""Rows → rows with their remote images, which are fetched while the rows before them are converted."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, TypeVar

from batchkit.tasks import Row

if TYPE_CHECKING:
    from batchkit.stocks import Stock, Ware

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
    for row in (remaining := iter(rows)):
        if remote_images(row):
            rest = itertools.chain([row], remaining)
            filled = fetched(rest, remote_images, lambda one: one.size, private_hosts=private_hosts)
            with closing(filled):
                for one, found in filled:
                    yield one._replace(fetched=found) if found else one
            return
        yield row


def fetched(
    things: Iterable[T], remote_images: Callable[[T], list[str]], size_of: Callable[[T], int], *, private_hosts: bool
) -> Generator[tuple[T, dict[str, bytes | str]]]:
    """The same of anything that names images: each with the bytes at its addresses, or why they cannot be had."""
    with ExitStack() as stack:
        for thing in (remaining := iter(things)):
            if addresses := remote_images(thing):
                from batchkit.stocks import Stock  # with asyncio and all: most images are local

                stock = stack.enter_context(Stock(private_hosts=private_hosts))
                yield from _fetched(thing, addresses, remaining, remote_images, size_of=size_of, stock=stock)
            else:
                yield thing, {}


def _fetched(
    first: T,
    addresses: list[str],
    others: Iterable[T],
    remote_images: Callable[[T], list[str]],
    *,
    size_of: Callable[[T], int],
    stock: Stock,
) -> Generator[tuple[T, dict[str, bytes | str]]]:
    """`first`, which has remote images, and all others."""
    ahead: deque[tuple[T, int, dict[str, Ware]]] = deque()
    images = size = 0
    named = itertools.chain([(first, addresses)], ((thing, remote_images(thing)) for thing in others))
    for thing, wanted in named:
        wares = {uri: stock.take(uri) for uri in wanted}
        if not wares and not ahead:
            yield thing, {}
            continue
        ahead.append((thing, size_of(thing), wares))
        images, size = images + len(wares), size + ahead[-1][1]
        while ahead and (images > AHEAD_IMAGES or len(ahead) > AHEAD_ROWS or size > AHEAD_BYTES or stock.is_full()):
            one, its_size, its = ahead.popleft()
            images, size = images - len(its), size - its_size
            yield one, {uri: stock.read(ware) for uri, ware in its.items()}
    while ahead:
        one, _, its = ahead.popleft()
        yield one, {uri: stock.read(ware) for uri, ware in its.items()}
