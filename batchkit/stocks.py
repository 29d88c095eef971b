"""Remote images on this disk: fetched in a thread of their own, each once, the longest unused thrown away first."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout

from batchkit.errors import RowError
from batchkit.fetching import NOT_NOW, Fetcher

MOST_BYTES = 4 << 30
"""On the disk. At most half of what is free there."""
MOST_FILES = 20_000
_PREFIX = "batchkit-images-"
_SETTLING_SECONDS = 60.0


class Ware:
    """One image, on its way (`future`) or here. `users` are the rows that wait for it; `size` in bytes, `fault` says
    why it cannot be had, and `passing` whether it may be another time. There are many: nothing else is kept of one that
    is here."""

    __slots__ = ("fault", "future", "number", "passing", "size", "users")

    def __init__(self, number: int, future: Future[int]) -> None:
        self.number = number
        self.future: Future[int] | None = future
        self.users = 0
        self.size = 0
        self.fault: str | None = None
        self.passing = False

    @property
    def is_ready(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return self.future is None or self.future.done()

    def wait(self) -> None:
        """Raises `BatchkitError` where no image can be had."""
        if self.future is None:
            return
        try:
            self.size = self.future.result()
        except RowError as exc:
            self.fault, self.passing = exc.message, exc.code == NOT_NOW
        self.future = None


class Stock:
    """Fetches images ahead of their use. A context manager; used by one thread. Nothing is started before the first
    image is asked for."""

    def __init__(self, *, private_hosts: bool = False) -> None:
        self._private_hosts = private_hosts
        self._wares: OrderedDict[str, Ware] = OrderedDict()
        self._numbers = itertools.count()
        self._arrived = 0
        self._removed = 0
        self._started: _Started | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._started is not None:
            self._started.end()
            self._started = None

    def take(self, uri: str) -> Ware:
        """The image at `uri`, which begins to be fetched unless it is here. `read` is owed one call for each `take`."""
        started = self._started = self._started or _Started(private_hosts=self._private_hosts)
        ware = self._wares.get(uri)
        if ware is None:
            number = next(self._numbers)
            future = started.fetch(uri, started.folder / str(number))
            future.add_done_callback(self._count)
            ware = self._wares[uri] = Ware(number, future)
        else:
            self._wares.move_to_end(uri)
        ware.users += 1
        return ware

    def read(self, ware: Ware) -> bytes | str:
        """The bytes of an image, or why it cannot be had; waits for it. Raises `BatchkitError` where none can."""
        ware.users -= 1
        ware.wait()
        return self._path(ware).read_bytes() if ware.fault is None else ware.fault

    def leave(self, ware: Ware) -> None:
        """Instead of `read`, where the image is not wanted any more."""
        ware.users -= 1

    def is_full(self) -> bool:
        """Whether there is no room for more before some of what was taken is read. Makes room first."""
        most = self._started.most_bytes if self._started is not None else MOST_BYTES
        while len(self._wares) > MOST_FILES or self._arrived - self._removed > most:
            uri = next((uri for uri, ware in self._wares.items() if not ware.users), None)
            if uri is None:
                return True
            ware = self._wares.pop(uri)
            self._removed += ware.size
            self._path(ware).unlink(missing_ok=True)
        return False

    def _path(self, ware: Ware) -> Path:
        assert self._started is not None  # noqa: S101  # it was, for the first one
        return self._started.folder / str(ware.number)

    def _count(self, future: Future[int]) -> None:
        """Called in the thread that fetches: only there `_arrived` changes."""
        if not future.cancelled() and future.exception() is None:
            self._arrived += future.result()


class _Started:
    """The folder, and the thread with its event loop."""

    def __init__(self, *, private_hosts: bool) -> None:
        _remove_abandoned()
        self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock = FileLock(self.folder / "lock")
        self._lock.acquire()
        self.most_bytes = min(MOST_BYTES, shutil.disk_usage(self.folder).free // 2)
        self._ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, Fetcher]] = Future()
        self._thread = threading.Thread(target=self._run, args=(private_hosts,), daemon=True)
        self._thread.start()
        self._loop, self._over, self._fetcher = self._ready.result()

    def fetch(self, uri: str, path: Path) -> Future[int]:
        return asyncio.run_coroutine_threadsafe(self._fetcher.fetch(uri, path), self._loop)

    def end(self) -> None:
        """Leave off whatever is under way, and remove everything."""
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)
        self._lock.release()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, private_hosts: bool) -> None:
        try:
            asyncio.run(self._serve(private_hosts))
        except BaseException as exc:
            if self._ready.done():
                raise
            self._ready.set_exception(exc)

    async def _serve(self, private_hosts: bool) -> None:
        async with Fetcher(private_hosts=private_hosts) as fetcher:
            over = asyncio.Event()
            self._ready.set_result((asyncio.get_running_loop(), over, fetcher))
            await over.wait()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)


def _remove_abandoned() -> None:
    """Remove the folders of processes that were killed: their locks are free."""
    for folder in Path(tempfile.gettempdir()).glob(_PREFIX + "*"):
        with contextlib.suppress(OSError, Timeout):
            if time.time() - folder.stat().st_mtime > _SETTLING_SECONDS:  # else its lock may not be taken yet
                with FileLock(folder / "lock", timeout=0):
                    shutil.rmtree(folder)
