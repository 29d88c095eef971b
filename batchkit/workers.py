"""Blocks of rows through several processes, in order, with few blocks on their way at once."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from batchkit import clusters, ownership, teams
from batchkit.arenas import SLOT_BYTES, Arena, Corner
from batchkit.conversion import Converted, Converter
from batchkit.errors import BatchkitError, EngineError
from batchkit.references import is_address
from batchkit.tasks import Row

BLOCK_ROWS = 16
"""Rows that travel together at first, and always to a cluster."""

BLOCK_SECONDS = 0.03
"""Then as many as take about so long: enough to hide the cost of a message, few enough to share the rest evenly."""

MOST_ROWS = 256

BLOCK_BYTES = 4 << 20
"""A block ends with the row that reaches this size."""

AHEAD = 3
"""Blocks under way for each worker."""

AHEAD_BYTES = 64 << 20
"""Bytes of rows under way, beyond which no further block is begun: a single row may have hundreds of megabytes."""

OWN_AHEAD = 2
"""Blocks of its own that the parent keeps until their turn comes."""

ALONE_ROWS, ALONE_SECONDS = 64, 0.25
"""Less work is not worth other processes: to start one takes about as long. Where their number is given, so many rows
are enough, too."""

_converter: Converter | None = None
_corner = Corner(None)
_of_clusters: dict[str, Converter] = {}


class Hands(NamedTuple):
    """Who does the work: so many processes, this one among them (None: one for each core), or the machines of the Ray
    cluster at `ray`."""

    workers: int | None = None
    ray: str | None = None


def convert_all(rows: Iterable[Row], make: Callable[[], Converter], hands: Hands) -> Generator[tuple[Row, Converted]]:
    """Each row with what became of it, in order. The bytes of a request are good until the next row is asked for."""
    rows = iter(rows)
    if hands.ray is not None:
        yield from _on_cluster(rows, make, hands.ray)
        return
    count = hands.workers or min(teams.cores(), teams.MOST)
    converter = make()
    if count == 1:
        for row in rows:
            yield row, converter(row)
        return
    began = time.monotonic()
    for number, row in enumerate(rows, 1):
        yield row, converter(row)
        seconds = time.monotonic() - began
        if seconds > ALONE_SECONDS or (hands.workers and number >= ALONE_ROWS):
            yield from _Crew(rows, make, converter, count - 1, pace=seconds / number).converted()
            return


class _Work(NamedTuple):
    """What became of the rows of a block. Where `lengths` has no 0, the line of a request is in the block's slot."""

    converted: list[Converted]
    lengths: list[int]
    seconds: float


class _Block(NamedTuple):
    rows: list[Row]
    size: int
    slot: int | None
    work: Future[_Work] | _Work


class _Crew:
    """Worker processes, and this one, which converts rows too where it would only wait for theirs. `pace` is how many
    seconds a row has taken so far."""

    def __init__(
        self, rows: Iterator[Row], make: Callable[[], Converter], converter: Converter, processes: int, *, pace: float
    ) -> None:
        self._rows = rows
        self._make = make
        self._converter = converter
        self._processes = processes
        self._under_way: deque[_Block] = deque()
        self._handed_over = 0
        self._own = 0
        self._size = 0
        self._block_rows = max(1, min(BLOCK_ROWS, int(BLOCK_SECONDS / max(pace, 1e-6))))

    def converted(self) -> Generator[tuple[Row, Converted]]:
        with Arena(AHEAD * self._processes) as arena:
            pool = teams.begin(self._processes, _start_worker, (self._make, os.getpid(), arena.path))
            try:
                while self._begin_more(pool, arena) or self._under_way:
                    yield from self._finished(arena)
            except BrokenProcessPool as exc:
                raise BatchkitError(
                    "a worker of prepare was killed, perhaps for want of memory",
                    hint="run the same command again, with --workers 1: it goes on where it stopped",
                ) from exc
            finally:
                for block in self._under_way:
                    if isinstance(block.work, Future):
                        block.work.cancel()
                pool.shutdown()

    def _begin_more(self, pool: Any, arena: Arena) -> bool:
        """Hand over what there is room for, and do some of the work here as long as the next block is not done.
        Whether there may be more rows."""
        while self._size <= AHEAD_BYTES:
            for_others = self._handed_over < AHEAD * self._processes
            if not for_others and (self._own >= OWN_AHEAD or _is_done(self._under_way[0])):
                return True
            rows = _take(self._rows, self._block_rows, BLOCK_BYTES)
            if not rows:
                return False
            size = _size(rows)
            self._size += size
            if for_others:
                slot = arena.take()
                self._under_way.append(_Block(rows, size, slot, pool.submit(_convert_block, rows, slot)))
                self._handed_over += 1
            else:
                self._under_way.append(_Block(rows, size, None, _convert(self._converter, rows, memoryview(b""))))
                self._own += 1
        return True

    def _finished(self, arena: Arena) -> Generator[tuple[Row, Converted]]:
        """The rows of the first block under way."""
        block = self._under_way.popleft()
        self._size -= block.size
        if isinstance(block.work, Future):
            work = block.work.result()
            self._handed_over -= 1
        else:
            work = block.work
            self._own -= 1
        lines = arena.slot(block.slot) if block.slot is not None else memoryview(b"")
        at = 0
        for row, done, length in zip(block.rows, work.converted, work.lengths, strict=True):
            yield row, done._replace(request=lines[at : at + length]) if length else done
            at += length
        arena.give_back(block.slot)
        self._keep_pace(work, at)

    def _keep_pace(self, work: _Work, shared_bytes: int) -> None:
        count = len(work.converted)
        wanted = count * BLOCK_SECONDS / max(work.seconds, 1e-6)
        if shared_bytes:
            wanted = min(wanted, count * SLOT_BYTES / shared_bytes * 0.9)
        self._block_rows = max(1, min(MOST_ROWS, int(wanted)))


def _is_done(block: _Block) -> bool:
    return not isinstance(block.work, Future) or block.work.done()


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
    if not is_address(root) and not Path(root).is_dir():
        return f"{root} is no folder on {socket.gethostname()}, of the Ray cluster: its images are not seen there"
    return [_of_clusters[token](row) for row in rows]


def _start_worker(make: Callable[[], Converter], parent: int, arena: str | None) -> None:
    global _converter, _corner  # noqa: PLW0603  # the state of a worker process: there is no other place
    teams.begin_worker(parent)
    ownership.claim()
    _converter = make()
    _corner = Corner(arena)


def _convert_block(rows: list[Row], slot: int | None) -> _Work:
    assert _converter is not None  # noqa: S101  # the initializer ran
    return _convert(_converter, rows, _corner.slot(slot))


def _convert(converter: Converter, rows: list[Row], room: memoryview) -> _Work:
    """Convert a block of rows, and put their requests into `room` as far as they fit."""
    began, at = time.monotonic(), 0
    converted, lengths = [], []
    for row in rows:
        done = converter(row)
        length = len(done.request) if done.request is not None else 0
        if length and at + length <= len(room):
            room[at : at + length] = done.request  # type: ignore[assignment]  # there is one
            done = done._replace(request=None)
            at += length
        else:
            length = 0
        converted.append(done)
        lengths.append(length)
    return _Work(converted, lengths, time.monotonic() - began)
