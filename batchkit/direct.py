"""Large files, written past the page cache: a copy that nobody here reads takes longer to find memory for than to
write. A thread writes while the next buffer is filled.

Through the page cache after all: where the file system knows no other way, what is too short for a block, and where the
disk is slow, for then the cache takes in more than the disk can.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import mmap
import os
import queue
import threading
import time
from collections import deque
from types import TracebackType
from typing import Any, Self

BUFFER_BYTES = 1 << 20
BUFFERS = 4
"""Where they lie in memory and in the file, and how long they are, is a multiple of any disk's logical blocks, as
open(2) asks of direct writes."""

PROBE_BYTES = 64 << 20
SLOW = 300e6
"""Bytes a second. A disk that has taken less, after so many bytes, is left to the page cache from there on."""

_DIRECT: int = getattr(os, "O_DIRECT", 0)  # not on macOS


class _Disk:
    """What is known of the speed of direct writes: of this process, which writes large files to one disk at a time."""

    def __init__(self) -> None:
        self.bytes = 0
        self.seconds = 0.0

    @property
    def is_slow(self) -> bool:
        return self.bytes >= PROBE_BYTES and self.bytes < SLOW * self.seconds


_disk = _Disk()
_spare: list[memoryview] = []
"""Buffers of files that are closed, for the next one: the memory of new ones would have to be found first."""


class LargeFile(io.BufferedIOBase):
    """A new file, written from its beginning to its end. What could not be written, a later call raises.

    At the end of a `with` block that an exception leaves, what is in the buffers is thrown away.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._process = os.getpid()
        self._past_cache = self._is_direct = False
        """What was asked for, and what the file system does."""
        self._free = [_spare.pop() if _spare else _new_buffer() for _ in range(BUFFERS)]
        self._under_way: deque[_Writing] = deque()
        self._buffer = self._free.pop()
        self._filled = 0
        self._offset = 0
        """Where in the file the buffer begins."""

    def write(self, data: Any, /) -> int:
        size, end = len(data), self._filled + len(data)
        if end <= BUFFER_BYTES:
            self._buffer[self._filled : end] = data
            self._filled = end
            return size
        rest = memoryview(data)
        while rest:
            piece = rest[: BUFFER_BYTES - self._filled]
            self._buffer[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            rest = rest[len(piece) :]
            if self._filled == BUFFER_BYTES:
                self._hand_over()
        return size

    def _hand_over(self) -> None:
        """Have the full buffer written while another is filled."""
        if self._past_cache == _disk.is_slow:
            self._finish()
            self._past_cache = not _disk.is_slow
            self._is_direct = _set_direct(self._file, self._past_cache)
        writing = _Writing(self._file, self._buffer, self._offset, direct=self._is_direct)
        _thread.take(writing)
        self._under_way.append(writing)
        self._offset += self._filled
        self._filled = 0
        if not self._free:
            self._finish_first()
        self._buffer = self._free.pop()

    def _finish(self) -> None:
        while self._under_way:
            self._finish_first()

    def _finish_first(self) -> None:
        writing = self._under_way[0]
        writing.wait()  # Ctrl-C may end this: whoever closes the file waits again
        self._under_way.popleft()
        self._free.append(writing.buffer)
        if writing.error is not None:
            raise writing.error

    def flush(self) -> None:
        """Have everything in the file, as far as the system is concerned. More may be written behind it."""
        if self.closed or os.getpid() != self._process:  # a forked process has the buffers of its parent
            return
        self._finish()
        if self._is_direct:
            self._past_cache = self._is_direct = _set_direct(self._file, False)
        _write_at(self._file, self._buffer[: self._filled], self._offset)

    def fileno(self) -> int:
        return self._file

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            try:
                super().close()  # which flushes
            finally:
                self._release()

    def _release(self) -> None:
        if os.getpid() == self._process:
            for writing in self._under_way:
                writing.wait()
        _spare.extend((self._buffer, *self._free, *(writing.buffer for writing in self._under_way)))
        del _spare[BUFFERS:]
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._filled = 0
            with contextlib.suppress(OSError):
                self._finish()
        self.close()


def _new_buffer() -> memoryview:
    return memoryview(mmap.mmap(-1, BUFFER_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))  # not with forked processes


class _Writing:
    """The writing of one buffer; `error` is what went wrong."""

    def __init__(self, file: int, buffer: memoryview, offset: int, *, direct: bool) -> None:
        self.buffer = buffer
        self.error: OSError | None = None
        self._file = file
        self._offset = offset
        self._direct = direct
        self._done = threading.Event()

    def wait(self) -> None:
        self._done.wait()

    def do(self) -> None:
        began = time.monotonic()
        try:
            self._write()
        except OSError as exc:
            self.error = exc
        if self._direct:
            _disk.bytes += len(self.buffer)
            _disk.seconds += time.monotonic() - began
        self._done.set()

    def _write(self) -> None:
        try:
            _write_at(self._file, self.buffer, self._offset)
        except OSError as exc:
            if not self._direct or exc.errno != errno.EINVAL:
                raise
            # Some file systems let themselves be asked, and refuse then.
            self._direct = _set_direct(self._file, False)
            _write_at(self._file, self.buffer, self._offset)


def _set_direct(file: int, wanted: bool) -> bool:
    """Whether the file is written directly now."""
    if not _DIRECT:
        return False
    flags = fcntl.fcntl(file, fcntl.F_GETFL) & ~_DIRECT
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | _DIRECT if wanted else flags)
    except OSError:  # EINVAL: the file system has no such writes
        return False
    return wanted


def _write_at(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


class _Thread:
    """The thread that writes. It begins with the first buffer, and again after `settle`."""

    def __init__(self) -> None:
        self._forget()
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """A forked process has no threads."""
        self._waiting: queue.SimpleQueue[_Writing | None] = queue.SimpleQueue()
        self._running: threading.Thread | None = None

    def take(self, writing: _Writing) -> None:
        if self._running is None:
            self._running = threading.Thread(target=self._run, name="batchkit-writing", daemon=True)
            self._running.start()
        self._waiting.put(writing)

    def _run(self) -> None:
        while (writing := self._waiting.get()) is not None:
            writing.do()

    def settle(self) -> None:
        """End the thread when it has written what it was given: a process without threads can be forked."""
        running, self._running = self._running, None
        if running is not None:
            self._waiting.put(None)
            running.join()


_thread = _Thread()
settle = _thread.settle
