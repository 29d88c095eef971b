"""Large files, written past the page cache: to find memory for a copy there may take longer than to write it, and than
to read it from the disk again. A thread writes while the next buffer is filled.

Through the page cache after all: where the file system knows no other way, what is too short for a block, and what the
disk is too slow for.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import queue
import threading
import time
import weakref
from collections import deque
from types import TracebackType
from typing import Any, Self

from batchkit.reserving import Reservation

BUFFER_BYTES = 1 << 20
BUFFERS = 4
"""Where they lie in memory and in the file, and how long they are, is a multiple of any disk's logical blocks, as
open(2) asks of direct writes."""

TRIED = 8
SLOW_SECONDS = 0.004
"""Where the last so many buffers took longer than this, on average, the disk is slower than the page cache: all of the
rest goes through that. What is written both ways at once waits for the disk both ways: ext4 and others let only one
write at a time to a file that grows."""

THREAD = "batchkit-writing"
"""Its name."""

_REFUSED = {errno.EINVAL, errno.EOPNOTSUPP}
_DIRECT: int | None = getattr(os, "O_DIRECT", None)  # not on macOS

_spare: list[memoryview] = []
"""Buffers of files that are closed, for the next one: the memory of new ones would have to be found first."""
_all: weakref.WeakSet[LargeFile] = weakref.WeakSet()


class LargeFile(io.BufferedIOBase):
    """A new file, written from its beginning to its end. What could not be written, a later call raises, and all after
    that.

    At the end of a `with` block that an exception leaves, what is in the buffers is thrown away.
    """

    _is_made = False
    """Files are closed when they are forgotten, also those that could not be made."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._free = [_spare.pop() if _spare else _new_buffer() for _ in range(BUFFERS)]
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._direct = _open_direct(path)
        self._process = os.getpid()
        self._under_way: deque[_Writing] = deque()
        self._buffer = self._free.pop()
        self._filled = 0
        self._flushed = 0
        """So much of the buffer is in the file already."""
        self._offset = 0
        """Where in the file the buffer begins."""
        self._times: deque[float] = deque(maxlen=TRIED)
        """Seconds that the last buffers took to be on the disk."""
        self._reservation = Reservation(self._file)
        self._threads: list[threading.Thread] = []
        self._waiting: queue.SimpleQueue[_Writing | None] | None = None
        """What the last of the threads is given; None where that one is to end."""
        self._error: BaseException | None = None
        self._is_abandoned = False
        self._is_made = True
        _all.add(self)

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        if self.closed:
            raise ValueError("write to closed file")  # its buffers may be another's
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
        """Have the full buffer written while another is filled, or write it here."""
        direct = self._direct if not self._is_slow() else None
        while self._under_way and (direct is None or not self._free or self._under_way[0].done.is_set()):
            self._finish_first()
        if direct is not None and (waiting := self._thread()) is not None:
            writing = _Writing(direct, self._file, self._buffer, self._offset)
            self._under_way.append(writing)
            waiting.put(writing)
            self._buffer = self._free.pop()
        else:
            self._reservation.cover(self._offset + self._filled)
            _write_at(self._file, self._buffer, self._offset)
        self._offset += self._filled
        self._filled = self._flushed = 0

    def _is_slow(self) -> bool:
        """Whether the disk has shown that it is slower than the page cache."""
        return len(self._times) == TRIED and sum(self._times) > TRIED * SLOW_SECONDS

    def _thread(self) -> queue.SimpleQueue[_Writing | None] | None:
        """What the thread takes its work from; None where there can be no thread."""
        if self._waiting is None:
            waiting: queue.SimpleQueue[_Writing | None] = queue.SimpleQueue()
            thread = threading.Thread(target=_write_all, args=(waiting,), name=THREAD, daemon=True)
            try:
                thread.start()
            except RuntimeError:  # so many are there already
                return None
            self._threads.append(thread)
            self._waiting = waiting
        return self._waiting

    def end_thread(self) -> None:
        """Wait until the thread has written what it was given, and is gone. The next buffer begins another."""
        if self._waiting is not None:
            self._waiting.put(None)  # twice, where Ctrl-C came between these lines: that does no harm
            self._waiting = None
        while self._threads:
            self._threads[-1].join()
            self._threads.pop()

    def _finish_first(self) -> None:
        writing = self._under_way[0]
        writing.done.wait()
        self._under_way.popleft()
        self._free.append(writing.buffer)
        self._times.append(writing.seconds)
        self._error = self._error or writing.error
        if self._error is not None:
            raise self._error

    def flush(self) -> None:
        """Have everything in the file, as far as the system is concerned."""
        # A forked process has the buffers of its parent.
        if not self._is_made or self.closed or self._is_abandoned or os.getpid() != self._process:
            return
        if self._error is not None:
            raise self._error
        while self._under_way:
            self._finish_first()
        _write_at(self._file, self._buffer[self._flushed : self._filled], self._offset + self._flushed)
        self._flushed = self._filled

    def close(self) -> None:
        if not self.closed:
            try:
                super().close()  # which flushes
            finally:
                if self._is_made:
                    self._release()

    def _release(self) -> None:
        if os.getpid() == self._process:
            self.end_thread()  # before the numbers of the files can be another's
            _spare.extend((self._buffer, *self._free))
            del _spare[BUFFERS:]
        try:
            if os.getpid() == self._process:
                self._reservation.end()
        finally:
            try:
                os.close(self._file)
            finally:
                if self._direct is not None:
                    os.close(self._direct)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_abandoned = kind is not None
        self.close()


def _new_buffer() -> memoryview:
    return memoryview(mmap.mmap(-1, BUFFER_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))  # not with forked processes


class _Writing:
    """The writing of one buffer past the page cache, or to `file` where that cannot be; `error` is what went wrong."""

    def __init__(self, direct: int, file: int, buffer: memoryview, offset: int) -> None:
        self.buffer = buffer
        self.error: BaseException | None = None
        self.seconds = 0.0
        self.done = threading.Event()
        self._direct = direct
        self._file = file
        self._offset = offset

    def do(self) -> None:
        began = time.monotonic()
        try:
            try:
                _write_at(self._direct, self.buffer, self._offset)
            except OSError as exc:
                if exc.errno not in _REFUSED:  # some file systems let themselves be asked, and refuse then
                    raise
                _write_at(self._file, self.buffer, self._offset)
        except BaseException as exc:  # noqa: BLE001  # whatever it is: whoever waits for this must hear of it
            self.error = exc
        self.seconds = time.monotonic() - began
        self.done.set()


def _write_all(waiting: queue.SimpleQueue[_Writing | None]) -> None:
    while (writing := waiting.get()) is not None:
        writing.do()


def _open_direct(path: str | os.PathLike[str]) -> int | None:
    """None where the file system has no such writes."""
    if _DIRECT is None:
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | _DIRECT)
    except OSError:
        return None


def _write_at(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def end_threads() -> None:
    """End the threads of all files: a process without threads can be forked. To be called where there are no other
    threads, which might be writing."""
    for file in list(_all):
        file.end_thread()
