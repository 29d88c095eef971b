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


class ReservingFile(io.FileIO):
    """A new file, written from its beginning to its end. Where nothing can be reserved, it is one like others."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, "wb")
        self._written = self._reserved = 0
        self._reserves = True

    def write(self, data: Any, /) -> int:
        self._written += len(data)
        if self._reserves and self._written > max(self._reserved, FIRST_BYTES):
            self._reserve()
        return super().write(data)

    def _reserve(self) -> None:
        fallocate = _fallocate()
        more = max(self._written - self._reserved, min(MOST_BYTES, self._written))
        if fallocate is None or fallocate(self.fileno(), _KEEP_SIZE, self._reserved, more) != 0:
            self._reserves = False  # also on a full disk: what is written may fit yet
            self._give_back()
        else:
            self._reserved += more

    def _give_back(self) -> None:
        """What was reserved and not used; some may be even where all could not be had."""
        os.ftruncate(self.fileno(), os.fstat(self.fileno()).st_size)

    def close(self) -> None:
        try:
            if not self.closed and self._reserved:
                self._give_back()
        finally:
            super().close()
