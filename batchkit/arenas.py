"""Memory that `prepare` and its workers share: request lines of many megabytes need not go through a pipe."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Self

SLOT_BYTES = 4 << 20
"""Room for the lines of one block of rows: enough to hide the cost of a message."""


class Arena:
    """Slots of shared memory. Used as a context manager; `path` is what the workers open, None where there is none.

    The memory has no name in any file system, so that nothing is left of it however the processes end.
    """

    def __init__(self, slots: int) -> None:
        self.path: str | None = None
        self._view = memoryview(b"")
        self._free = list(range(slots))
        create: Callable[[str], int] | None = getattr(os, "memfd_create", None)  # Linux alone
        if create is None or not os.path.isdir("/proc/self/fd"):  # noqa: PTH112
            return
        with suppress(OSError):
            self._file = create("batchkit")
            os.ftruncate(self._file, slots * SLOT_BYTES)
            self._view = memoryview(mmap.mmap(self._file, slots * SLOT_BYTES))
            self.path = f"/proc/{os.getpid()}/fd/{self._file}"

    def take(self) -> int | None:
        """The number of a slot that is free; None where there is none."""
        return self._free.pop() if self.path is not None and self._free else None

    def give_back(self, slot: int | None) -> None:
        if slot is not None:
            self._free.append(slot)

    def slot(self, number: int) -> memoryview:
        return self._view[number * SLOT_BYTES : (number + 1) * SLOT_BYTES]

    def close(self) -> None:
        if self.path is not None:
            os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Corner:
    """The arena as a worker sees it. What cannot be opened (another user's process, say) has no room."""

    def __init__(self, path: str | None) -> None:
        self._view = memoryview(b"")
        if path is not None:
            with suppress(OSError), open(path, "r+b", buffering=0) as stream:
                self._view = memoryview(mmap.mmap(stream.fileno(), 0))

    def slot(self, number: int | None) -> memoryview:
        return self._view[number * SLOT_BYTES : (number + 1) * SLOT_BYTES] if number is not None else memoryview(b"")
