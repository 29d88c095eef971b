"""Large files, written past the page cache: where this machine would keep a copy that nobody reads, it need not find the
memory for it, which takes longer than the writing. A thread writes one buffer while the next is filled.

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
import threading
import time
import weakref
from types import TracebackType
from typing import Any, Self

BUFFER_BYTES = 2 << 20
"""Of these there are two. Where they lie in memory and in the file, and how long they are, is a multiple of any disk's
logical blocks, as open(2) asks of direct writes."""

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
_open: weakref.WeakSet[LargeFile] = weakref.WeakSet()


class LargeFile(io.BufferedIOBase):
    """A new file, written from its beginning to its end. What a write could not write, a later one raises, or the end.

    At the end of a `with` block that an exception leaves, what is in the buffers is thrown away.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._process = os.getpid()
        self._is_direct = False
        self._buffer, self._other = memoryview(mmap.mmap(-1, BUFFER_BYTES)), memoryview(mmap.mmap(-1, BUFFER_BYTES))
        self._filled = 0
        self._offset = 0
        """Where in the file the buffer begins."""
        self._writing: _Writing | None = None
        _open.add(self)

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
        """Have the full buffer written while the other is filled."""
        self._finish_writing()
        self._be_direct(not _disk.is_slow)
        self._writing = _Writing(self._file, self._buffer, self._offset, direct=self._is_direct)
        self._writing.start()
        self._offset += self._filled
        self._filled = 0
        self._buffer, self._other = self._other, self._buffer

    def _finish_writing(self) -> None:
        writing = self._writing
        if writing is not None:
            writing.join()  # Ctrl-C may end this: the thread is waited for again before the file is closed
            self._writing = None
            self._is_direct = writing.direct
            if writing.error is not None:
                raise writing.error

    def _be_direct(self, wanted: bool) -> None:
        if wanted != self._is_direct and _DIRECT:
            flags = fcntl.fcntl(self._file, fcntl.F_GETFL) & ~_DIRECT
            with contextlib.suppress(OSError):  # EINVAL: the file system has no such writes
                fcntl.fcntl(self._file, fcntl.F_SETFL, flags | _DIRECT if wanted else flags)
                self._is_direct = wanted

    def settle(self) -> None:
        """Wait until no thread writes; what it could not write is raised later."""
        if self._writing is not None:
            self._writing.join()

    def flush(self) -> None:
        """Have everything in the file, as far as the system is concerned. More may be written behind it."""
        if self.closed or os.getpid() != self._process:  # a forked process has the buffers of its parent
            return
        self._finish_writing()
        self._be_direct(False)
        _write_at(self._file, self._buffer[: self._filled], self._offset)

    def fileno(self) -> int:
        return self._file

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        if self.closed:
            return
        try:
            super().close()  # which flushes
        finally:
            self._abandon()

    def _abandon(self) -> None:
        if self._process == os.getpid():
            self.settle()
        self._filled = 0
        self._writing = None
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._filled = 0
            with contextlib.suppress(OSError):
                self._finish_writing()
        self.close()


class _Writing(threading.Thread):
    """The writing of one buffer. Afterwards `direct` says whether it was, `error` what went wrong."""

    def __init__(self, file: int, buffer: memoryview, offset: int, *, direct: bool) -> None:
        super().__init__(name="batchkit-writing")
        self.direct = direct
        self.error: OSError | None = None
        self._file = file
        self._buffer = buffer
        self._offset = offset

    def run(self) -> None:
        began = time.monotonic()
        try:
            try:
                _write_at(self._file, self._buffer, self._offset)
            except OSError as exc:
                if not self.direct or exc.errno != errno.EINVAL:
                    raise
                # Some file systems let themselves be asked, and refuse then.
                fcntl.fcntl(self._file, fcntl.F_SETFL, fcntl.fcntl(self._file, fcntl.F_GETFL) & ~_DIRECT)
                self.direct = False
                _write_at(self._file, self._buffer, self._offset)
        except OSError as exc:
            self.error = exc
        if self.direct:
            _disk.bytes += len(self._buffer)
            _disk.seconds += time.monotonic() - began


def _write_at(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def settle() -> None:
    """Wait until no thread of this module is at work: a process without threads can be forked."""
    for file in list(_open):
        file.settle()
