"""Blocks of rows through several processes, in order, with few blocks on their way at once."""

from __future__ import annotations

import itertools
import os
import secrets
import socket
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from batchkit import clusters, teams
from batchkit.conversion import Converted, Converter
from batchkit.errors import BatchkitError, EngineError
from batchkit.references import is_remote
from batchkit.tasks import Row

BLOCK_ROWS = 16
"""Rows that travel together: enough to hide the cost of a message, few enough to bound the memory of big images."""

BLOCK_BYTES = 4 << 20
"""A block ends with the row that reaches this size."""

AHEAD = 3
"""Blocks under way for each worker."""

AHEAD_BYTES = 64 << 20
"""Bytes of rows under way, beyond which no further block is begun: a single row may have hundreds of megabytes."""

_converter: Converter | None = None
_of_clusters: dict[str, Converter] = {}


class Hands(NamedTuple):
    """Who does the work: so many processes (None: one for each core), or the machines of the Ray cluster at `ray`."""

    workers: int | None = None
    ray: str | None = None


def convert_all(rows: Iterable[Row], make: Callable[[], Converter], hands: Hands) -> Generator[tuple[Row, Converted]]:
    """Each row with what became of it, in order. Few rows are not worth other processes."""
    rows = iter(rows)
    if hands.ray is not None:
        yield from _on_cluster(rows, make, hands.ray)
        return
    first = _take(rows, 4 * BLOCK_ROWS, 4 * BLOCK_BYTES)
    count = hands.workers or min(teams.cores(), teams.MOST)
    if count == 1 or (len(first) < 4 * BLOCK_ROWS and _size(first) < 4 * BLOCK_BYTES):
        converter = make()
        for row in itertools.chain(first, rows):
            yield row, converter(row)
        return
    yield from _in_processes(itertools.chain(first, rows), make, count)


def _in_processes(rows: Iterator[Row], make: Callable[[], Converter], count: int) -> Iterator[tuple[Row, Converted]]:
    # loky rather than concurrent.futures: a script without an `if __name__ == "__main__"` guard works, too.
    from loky import ProcessPoolExecutor

    pool = ProcessPoolExecutor(max_workers=count, initializer=_start_worker, initargs=(make, os.getpid()))
    under_way: deque[tuple[list[Row], Future[list[Converted]]]] = deque()
    try:
        while block := _take(rows, BLOCK_ROWS, BLOCK_BYTES):
            under_way.append((block, pool.submit(_convert_block, block)))
            while len(under_way) >= AHEAD * count or sum(_size(one) for one, _ in under_way) > AHEAD_BYTES:
                yield from _finished(*under_way.popleft())
        while under_way:
            yield from _finished(*under_way.popleft())
    except BrokenProcessPool as exc:
        raise BatchkitError(
            "a worker of prepare was killed, perhaps for want of memory",
            hint="run the same command again, with --workers 1: it goes on where it stopped",
        ) from exc
    finally:
        for _, future in under_way:
            future.cancel()
        pool.shutdown()


def _take(rows: Iterator[Row], most: int, most_bytes: int) -> list[Row]:
    """The next rows, up to `most`, or up to the one that makes them `most_bytes`."""
    block: list[Row] = []
    size = 0
    while len(block) < most and size < most_bytes and (row := next(rows, None)) is not None:
        block.append(row)
        size += row.size
    return block


def _size(rows: list[Row]) -> int:
    return sum(row.size for row in rows)


def _on_cluster(rows: Iterator[Row], make: Callable[[], Converter], address: str) -> Iterator[tuple[Row, Converted]]:
    """Blocks as tasks of a Ray cluster, wherever a core is free. One whose machine goes down is done again."""
    with clusters.connected(address) as ray:
        convert = ray.remote(_convert_there).options(num_cpus=1, max_retries=3)
        shared, token = ray.put(make), secrets.token_hex(8)
        ahead = AHEAD * max(1, sum(node.cpus for node in clusters.nodes(ray)))
        under_way: deque[tuple[list[Row], Any]] = deque()
        try:
            while block := _take(rows, BLOCK_ROWS, BLOCK_BYTES):
                under_way.append((block, convert.remote(token, shared, block)))
                if len(under_way) >= ahead:
                    yield from _fetched(ray, address, *under_way.popleft())
            while under_way:
                yield from _fetched(ray, address, *under_way.popleft())
        finally:
            for _, reference in under_way:
                ray.cancel(reference)


def _fetched(ray: Any, address: str, block: list[Row], reference: Any) -> Iterator[tuple[Row, Converted]]:
    try:
        done: Sequence[Converted] | str = ray.get(reference)
    except ray.exceptions.RayError as exc:
        raise EngineError(
            f"the Ray cluster at {address} cannot do the work of prepare: {clusters.reason(exc)}",
            hint="the same version of batchkit, with the extra ray, is needed on each of its machines",
        ) from exc
    if isinstance(done, str):
        raise EngineError(done, hint="prepare --ray needs a file system that all machines see under the same paths")
    return zip(block, done, strict=True)


def _convert_there(token: str, make: Callable[[], Converter], rows: list[Row]) -> list[Converted] | str:
    """In a worker of a Ray cluster. A text where its machine cannot do what this one can."""
    if token not in _of_clusters:
        _of_clusters.clear()
        _of_clusters[token] = make()
    root = _of_clusters[token].root
    if not is_remote(root) and not Path(root).is_dir():
        return f"{root} is no folder on {socket.gethostname()}, of the Ray cluster: its images are not seen there"
    return [_of_clusters[token](row) for row in rows]


def _finished(block: list[Row], future: Future[list[Converted]]) -> Iterator[tuple[Row, Converted]]:
    return zip(block, future.result(), strict=True)


def _start_worker(make: Callable[[], Converter], parent: int) -> None:
    global _converter  # noqa: PLW0603  # the state of a worker process: there is no other place
    teams.begin_worker(parent)
    _converter = make()


def _convert_block(rows: list[Row]) -> list[Converted]:
    assert _converter is not None  # noqa: S101  # the initializer ran
    return [_converter(row) for row in rows]
