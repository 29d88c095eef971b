"""Blocks of rows through several processes, in order, with few blocks on their way at once."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from batchkit.conversion import Converted, Converter
from batchkit.errors import BatchkitError
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


def convert_all(
    rows: Iterable[Row], make: Callable[[], Converter], workers: int | None
) -> Generator[tuple[Row, Converted]]:
    """Each row with what became of it, in order. `workers` None is one process for each core, none for few rows."""
    rows = iter(rows)
    first = _take(rows, 4 * BLOCK_ROWS, 4 * BLOCK_BYTES)
    count = workers or min(_cores(), 16)
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


def _finished(block: list[Row], future: Future[list[Converted]]) -> Iterator[tuple[Row, Converted]]:
    return zip(block, future.result(), strict=True)


def _start_worker(make: Callable[[], Converter], parent: int) -> None:
    global _converter  # noqa: PLW0603  # the state of a worker process: there is no other place
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent: it ends us
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    _converter = make()


def _die_with(parent: int) -> None:
    """End this process when the parent is gone: killed with SIGKILL it cannot end us itself."""
    pause = threading.Event()
    while os.getppid() == parent:
        pause.wait(1.0)
    os._exit(1)


def _convert_block(rows: list[Row]) -> list[Converted]:
    assert _converter is not None  # noqa: S101  # the initializer ran
    return [_converter(row) for row in rows]


def _cores() -> int:
    affinity: Any = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1
