"""Files for which room on the disk is reserved ahead of what is written: the file system then need not look for it
page by page, which for large files takes longer than copying the bytes (ext4: two to three times)."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from functools import cache
from typing import Any

FIRST_BYTES, MOST_BYTES = 1 << 20, 64 << 20
"""What is reserved at once: as much as the file has, between these. Smaller files are left alone."""

_KEEP_SIZE = 1
"""FALLOC_FL_KEEP_SIZE of linux/falloc.h: the size that others see grows as bytes are written."""


@cache
def _fallocate() -> Callable[..., int] | None:
    """fallocate(2); None where there is none. Not `os.posix_fallocate`, which writes zeros where a file system cannot
    reserve."""
    import ctypes

    try:
        found = ctypes.CDLL(None).fallocate
    except (AttributeError, OSError):
        return None
    found.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return found


class Reservation:
    """Room for a new file that is written from its beginning to its end, by its descriptor."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._reserved = 0
        self._reserves = True

    def cover(self, end: int) -> None:
        """Bytes up to `end` are about to be written: have room for them, and for some that may follow."""
        if not self._reserves or end <= max(self._reserved, FIRST_BYTES):
            return
        fallocate = _fallocate()
        more = max(end - self._reserved, min(MOST_BYTES, end))
        if fallocate is None or fallocate(self._file, _KEEP_SIZE, self._reserved, more) != 0:
            self._reserves = False  # also on a full disk: what is written may fit yet
            self._give_back()
        else:
            self._reserved += more

    def end(self) -> None:
        """Give back what nothing was written to."""
        if self._reserved:
            self._give_back()

    def _give_back(self) -> None:
        """What was reserved and not used; some may be even where all could not be had."""
        os.ftruncate(self._file, os.fstat(self._file).st_size)


class ReservingFile(io.FileIO):
    """A new file, written from its beginning to its end. Where nothing can be reserved, it is one like others."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, "wb")
        self._written = 0
        self._reservation = Reservation(self.fileno())

    def write(self, data: Any, /) -> int:
        self._written += len(data)
        self._reservation.cover(self._written)
        return super().write(data)

    def close(self) -> None:
        try:
            if not self.closed:
                self._reservation.end()
        finally:
            super().close()
