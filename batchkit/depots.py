"""Results that go straight to a bucket: written to a folder of their own first, put when they are whole.

The folder is for as long as the process runs; each file in it is gone as soon as it is in the bucket.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from batchkit import s3, storage
from batchkit.errors import StorageError, UsageError

_folders: dict[tuple[int, str], tuple[Path, tempfile.TemporaryDirectory[str]]] = {}


def local_side(uri: str) -> Path:
    """Where to write what is to become the object `uri`."""
    folder, _, name = uri.rpartition("/")
    if not name or folder in ("s3:/", "s3:"):
        raise UsageError(f"{uri}: names no object in a bucket", hint="-o s3://BUCKET/results.jsonl")
    key = os.getpid(), folder
    if key not in _folders:
        made = tempfile.TemporaryDirectory(prefix="batchkit-")
        _folders[key] = Path(made.name).resolve(), made
        storage.follow(_folders[key][0], _Depot(folder, _folders[key][0]))
    return _folders[key][0] / name


class _Depot:
    """Everything below `uri` that is written here."""

    def __init__(self, uri: str, root: Path) -> None:
        self.uri = uri
        self._root = root

    def place(self, aside: Path, target: Path) -> None:
        s3.put_file(self._where(target), aside)

    def remove(self, target: Path) -> None:
        with contextlib.suppress(StorageError):  # who may put need not be let delete what is hardly ever there
            s3.delete(self._where(target))

    def grew(self, target: Path) -> None:
        pass

    def settle(self, target: Path) -> None:
        s3.put_file(self._where(target), target)

    def names_below(self, folder: Path) -> list[str]:
        with contextlib.suppress(StorageError):  # nor list it
            return [found.name for found in s3.listed(f"{self._where(folder)}/")]
        return []

    def _where(self, target: Path) -> str:
        return f"{self.uri}/{target.relative_to(self._root).as_posix()}"
