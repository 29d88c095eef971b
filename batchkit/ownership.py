"""Whether this process does nothing but batchkit's work: then it may do what no library may do to a user's process."""

from __future__ import annotations

import contextlib
import sys

KEPT_BYTES = 64 << 20
"""What malloc keeps of the memory that one image took, for the next one: to ask the system for new pages each time
takes a sixth of all the time."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MOST = -1, -3, 32 << 20
"""Of mallopt(3), in glibc's malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, and the most that the latter may be."""


class _Process:
    """What is known of this process, and of those that are forked off it."""

    ours = False
    keeps = False


def claim() -> None:
    """To be called first in a process of ours: then libraries start no threads in it, so that workers can be forked off
    it (`teams`), and its malloc may keep what it has."""
    _Process.ours = True


def is_ours() -> bool:
    return _Process.ours


def keep_memory() -> None:
    """Let the next image use the memory of the one before, where the process is ours and its malloc is glibc's."""
    if not _Process.ours or _Process.keeps or sys.platform != "linux":
        return
    _Process.keeps = True
    import ctypes

    with contextlib.suppress(AttributeError):  # musl has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, _MMAP_MOST)
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
