"""Processes that work side by side, and what came of it in order, with few tasks on their way at once.

Where this process has one thread alone, on Linux, the others are forked off it, in a few milliseconds. Anywhere else
they begin as new ones, through loky: the fork of a process with threads may find a lock held by one that is not there.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, Self, TypeVar

from batchkit import direct

AHEAD = 2
"""Tasks under way for each worker: so much lies on the disk, or in memory, before its turn comes."""
MOST = 16
ENDING_TRIES = 5

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    affinity: Any = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def can_fork() -> bool:
    """Whether workers begin at once. Threads are counted by the kernel: libraries have some that Python knows not.
    Those of `direct` do not count: they end when it comes to that."""
    tasks = Path("/proc/self/task")
    others = [thread.name for thread in threading.enumerate() if thread is not threading.current_thread()]
    if sys.platform != "linux" or not tasks.is_dir() or set(others) - {direct.THREAD}:
        return False
    for _ in range(ENDING_TRIES):  # the kernel may still have a thread that Python has joined
        if len(list(tasks.iterdir())) == 1 + len(others):
            return True
        time.sleep(0.001)
    return False


def _may_fork_now() -> bool:
    """Whether workers can be forked; then there is no other thread."""
    if not can_fork():
        return False
    direct.end_threads()
    return can_fork()


class Team:
    """Processes for one task after another, of any kind; a team of one is this process. As a context manager."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool: Executor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def in_order(self, tasks: Iterable[T], work: Callable[[T], R]) -> Generator[tuple[T, R]]:
        """Each task with its result, in order. Raises what `work` raises, and `BrokenProcessPool` where a worker
        dies. To be closed by who does not take all of it."""
        if self.workers == 1:
            for task in tasks:
                yield task, work(task)
            return
        if self._pool is None:
            self._pool = begin(self.workers, begin_worker, (os.getpid(),))
        under_way: deque[tuple[T, Future[R]]] = deque()
        try:
            for task in tasks:
                under_way.append((task, self._pool.submit(work, task)))
                if len(under_way) >= AHEAD * self.workers:
                    yield _done(*under_way.popleft())
            while under_way:
                yield _done(*under_way.popleft())
        finally:
            for _, future in under_way:
                future.cancel()


def _done(task: T, future: Future[R]) -> tuple[T, R]:
    return task, future.result()


def begin(workers: int, initializer: Callable[..., None], arguments: tuple[Any, ...]) -> Executor:
    """A pool of processes. `initializer` is called in each of them with `arguments`; it calls `begin_worker` first."""
    if _may_fork_now():
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        fork = multiprocessing.get_context("fork")
        forked = ProcessPoolExecutor(workers, mp_context=fork, initializer=initializer, initargs=arguments)
        forked.submit(os.getpid)  # all begin with the first task: now, for whoever makes the tasks may start threads
        return forked
    # loky rather than concurrent.futures: a script without an `if __name__ == "__main__"` guard works, too.
    import loky

    made: Executor = loky.ProcessPoolExecutor(workers, initializer=initializer, initargs=arguments)
    return made


def begin_worker(parent: int) -> None:
    """To be called first in a worker process of `parent`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent: it ends us
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _die_with(parent: int) -> None:
    """End this process when the parent is gone: killed with SIGKILL it cannot end us itself."""
    pause = threading.Event()
    while os.getppid() == parent:
        pause.wait(0.2)
    os._exit(1)
