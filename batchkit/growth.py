"""Files that grow, on their way to a bucket: what is new goes there as numbered parts, every few seconds.

`responses/00000.1.jsonl.part-00001` and so on: their lines, in the order of the numbers, are the file so far. When
nothing more will come, the whole file is put, and the parts are removed: so a machine that is lost costs seconds.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from batchkit import s3
from batchkit.errors import BatchkitError, RunBusyError

PART = ".part-"
PART_SECONDS = 10.0


class _Growing(msgspec.Struct):
    """`sent` bytes of the file are in the bucket, in the objects `parts`. While `paused` no more are sent."""

    path: Path
    paused: bool = False
    sent: int = 0
    parts: list[str] = []


class Growth:
    """The files that grow in this process. `where` gives an object's URI; `check` raises where nothing may be put."""

    def __init__(self, where: Callable[[str], str], check: Callable[[], None]) -> None:
        self._where = where
        self._check = check
        self._lock = threading.Lock()
        self._files: dict[str, _Growing] = {}
        self._thread: threading.Thread | None = None
        self._lost: RunBusyError | None = None

    def grew(self, name: str, path: Path) -> None:
        """Raises `RunBusyError` where the leases are lost."""
        if self._lost is not None:
            lost, self._lost = self._lost, None
            raise lost
        if name not in self._files:
            with self._lock:
                self._files[name] = _Growing(path, parts=[])
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep, name="batchkit-parts", daemon=True)
            self._thread.start()

    def has(self, name: str) -> bool:
        return name in self._files

    def pause(self, name: str) -> None:
        """Send no more parts of it for now: it is sent whole. If that fails, it is still known what there is."""
        with self._lock:
            if name in self._files:
                self._files[name].paused = True

    def stop(self, name: str) -> list[str]:
        """Send no more of it; returns the parts that are in the bucket."""
        with self._lock:
            growing = self._files.pop(name, None)
            return growing.parts if growing is not None else []

    def _keep(self) -> None:
        pause = threading.Event()
        while True:
            pause.wait(PART_SECONDS)
            for name in list(self._files):
                try:
                    # What cannot be sent now is sent the next time, or whole at the end.
                    with contextlib.suppress(OSError), self._lock:
                        self._send(name)
                except RunBusyError as exc:
                    self._lost = exc
                except BatchkitError:
                    continue

    def _send(self, name: str) -> None:
        growing = self._files.get(name)
        if growing is None or growing.paused:
            return
        with open(growing.path, "rb") as stream:
            stream.seek(growing.sent)
            new = stream.read()
        new = new[: new.rfind(b"\n") + 1]
        if not new:
            return
        self._check()
        part = f"{name}{PART}{len(growing.parts) + 1:05d}"
        s3.put(self._where(part), new)
        growing.sent += len(new)
        growing.parts.append(part)
