"""Folders of images that batchkit writes: `ROW/output_image_1.png` and so on, in place all at once or not at all.

Images are kept aside as the responses are read, one file each, and get their names when their row's turn comes: a
response that is never chosen leaves nothing, and no image stays in memory.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pybase64

from batchkit.errors import StorageError
from batchkit.generated import Generated, Inline
from batchkit.storage import follower_of

MARK = ".made-by-batchkit"
"""A file in each such folder: only what has it is ever replaced."""

_KEPT = "kept"
_OURS = re.compile(rf"\d+/(output|problem)_image_\d+\.\w+|{re.escape(MARK)}")
# The first bytes of a file → the ending of its name.
_SIGNATURES = ((b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff", "jpg"), (b"GIF8", "gif"), (b"BM", "bmp"))
_ENDINGS = {"image/png": "png", "image/jpeg": "jpg", "image/gif": "gif", "image/webp": "webp", "image/bmp": "bmp",
            "image/svg+xml": "svg", "image/avif": "avif", "image/tiff": "tiff", "image/heic": "heic"}  # fmt: skip


def ending_of(data: bytes, media_type: str = "") -> str:
    """The ending that names the type of an image: by its first bytes, else by what it is said to be, else `bin`."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    found = next((ending for signature, ending in _SIGNATURES if data.startswith(signature)), None)
    return found or _ENDINGS.get(media_type, "bin")


class Album:
    """The folder `folder`, made anew. Nothing is at its place before the block of `opened` ends well."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._aside: Path | None = None
        self._kept = 0
        self._placed: dict[str, str] = {}
        self._row: int | None = None

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        try:
            yield
            with self._told():
                self._commit()
        finally:
            if self._aside is not None:
                shutil.rmtree(self._aside, ignore_errors=True)

    def keep(self, image: Inline) -> str:
        """Write the bytes of a generated image aside; the name by which `place` finds them. What is no base64 is kept
        as the text that it is: it was paid for."""
        data, ending = _decoded(image)
        self._kept += 1
        self._placed.clear()  # all images of a shard are kept before the first of them is placed
        name = f"{self._kept}.{ending}"
        with self._told():
            (self._begun() / _KEPT / name).write_bytes(data)
        return name

    def place(self, row: int, images: Sequence[Generated]) -> list[str]:
        """Give the images of a row their names, relative to where the folder lies; links stay what they are."""
        names = []
        for count, image in enumerate(images, 1):
            if image.kept is None:
                names.append(image.link or "")
                continue
            if image.kept in self._placed:  # several rows have this response
                names.append(self._placed[image.kept])
                continue
            name = f"{row}/output_image_{count}.{image.kept.rpartition('.')[2]}"
            with self._told():
                os.replace(self._begun() / _KEPT / image.kept, self._ready(row, name))
            names.append(f"{self._folder.name}/{name}")
            self._placed[image.kept] = names[-1]
        return names

    def add(self, row: int, name: str, data: bytes) -> str:
        """Put an image of a row into the folder under `name`; the path relative to where the folder lies."""
        with self._told():
            self._ready(row, f"{row}/{name}").write_bytes(data)
        return f"{self._folder.name}/{row}/{name}"

    def _ready(self, row: int, name: str) -> Path:
        aside = self._begun()
        if row != self._row:
            (aside / str(row)).mkdir(exist_ok=True)
            self._row = row
        return aside / name

    def _begun(self) -> Path:
        if self._aside is None:
            if self._folder.exists() and not self._is_ours():
                raise StorageError(
                    f"{self._folder}: is there already, and was not made by batchkit: it is not replaced",
                    hint="move it away, or write the results elsewhere with -o",
                )
            self._aside = self._neighbour()
            (self._aside / _KEPT).mkdir(parents=True)
            (self._aside / MARK).touch()
        return self._aside

    def _is_ours(self) -> bool:
        return self._is_made() or (self._folder.is_dir() and not any(self._folder.iterdir()))

    def _is_made(self) -> bool:
        """Whether the folder was made by batchkit: all is that is the local side of a bucket."""
        return (self._folder / MARK).is_file() or (self._folder.exists() and follower_of(self._folder) is not None)

    def _commit(self) -> None:
        old = self._neighbour()
        if self._is_made() or (self._aside is not None and self._folder.exists()):
            os.replace(self._folder, old)
        if self._aside is not None:
            shutil.rmtree(self._aside / _KEPT)
            os.replace(self._aside, self._folder)
        self._tell()
        shutil.rmtree(old, ignore_errors=True)

    def _tell(self) -> None:
        """Where the folder is the local side of a bucket: make the other side equal to it."""
        follower = follower_of(self._folder)
        if follower is None:
            return
        now_there = {path.relative_to(self._folder) for path in self._folder.rglob("*") if path.is_file()}
        now_there.discard(Path(MARK))
        for name in sorted(now_there):
            follower.place(self._folder / name, self._folder / name)
        for there in follower.names_below(self._folder):  # also of a merge on another machine
            if _OURS.fullmatch(there) and Path(there) not in now_there:
                follower.remove(self._folder / there)

    def _neighbour(self) -> Path:
        return self._folder.with_name(f".{self._folder.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise StorageError(
                f"{self._folder}: cannot be written: {exc.strerror or exc}", hint="free some disk space and try again"
            ) from exc


def _decoded(image: Inline) -> tuple[bytes, str]:
    text = "".join(image.text.split()).replace("-", "+").replace("_", "/")  # base64url, too
    try:
        data = pybase64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        return image.text.encode("utf-8", "replace"), "txt"
    return data, ending_of(data, image.media_type)
