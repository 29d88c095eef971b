"""The images of one process, each read and changed once, however many rows in a row ask about it."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path

import xxhash

from batchkit import images
from batchkit.images import ImageOptions, Picture

NEW_BYTES = 4 << 20
"""What may be held of pictures that were wanted once. A run in which each is wanted once holds no more."""

KEPT_BYTES = 60 << 20
"""What may be held of pictures that were wanted again, and of large ones."""

PASSED = 16_384
"""So many pictures that went unused are known again: the tasks may go through all images question by question."""

OVERHEAD = 500
"""Bytes that a held picture takes beside its own."""


class Pictures:
    """Loads images as `options` ask; paths are relative to `root`. What it holds is bounded in bytes.

    A file is known by its path, size, inode and times: one that is replaced is read anew. Images that are not files are
    known by their content. What cannot be loaded is not remembered.
    """

    def __init__(self, root: Path, options: ImageOptions) -> None:
        self._root = root
        self._folder = str(root)
        self._options = options
        self._memory = Memory()
        self._seed = secrets.randbits(64)  # nobody can make two images that are taken for one

    def load(self, reference: str | bytes, *, name: str) -> Picture:
        """As `images.load`."""
        if isinstance(reference, bytes) or reference.startswith("data:"):
            return self._memory.get(
                self._digest(reference), lambda: images.load(reference, self._root, self._options, name=name)
            )
        path, found = images.find(reference, self._folder)
        state = (path, found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)
        return self._memory.get(
            state, lambda: images.convert(images.read(path, reference), self._options, name=reference)
        )

    def _digest(self, inline: str | bytes) -> bytes:
        content = inline if isinstance(inline, bytes) else inline.encode("utf-8", "surrogatepass")
        return xxhash.xxh3_128_digest(content, seed=self._seed)


class Memory:
    """Pictures that were made, by their keys. What was wanted once makes room first, and soon."""

    def __init__(self, *, new_bytes: int = NEW_BYTES, kept_bytes: int = KEPT_BYTES) -> None:
        self._new = _Shelf(new_bytes)
        self._kept = _Shelf(kept_bytes)
        self._passed: OrderedDict[int, None] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Picture]) -> Picture:
        """The picture of `key`: the one that is held, else what `make` returns."""
        if (picture := self._kept.get(key)) is not None:
            return picture
        if (picture := self._new.pop(key)) is not None:
            self._kept.put(key, picture)
            return picture
        picture = make()
        known = hash(key) in self._passed
        if known or _size(picture) > self._new.limit:
            self._kept.put(key, picture)
        else:
            for gone in self._new.put(key, picture):
                self._pass(gone)
        return picture

    @property
    def size(self) -> int:
        return self._new.size + self._kept.size

    def _pass(self, key: Hashable) -> None:
        self._passed[hash(key)] = None
        if len(self._passed) > PASSED:
            self._passed.popitem(last=False)


class _Shelf:
    """Holds pictures up to `limit` bytes. The one that was not wanted for longest goes first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._held: OrderedDict[Hashable, Picture] = OrderedDict()

    def get(self, key: Hashable) -> Picture | None:
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def pop(self, key: Hashable) -> Picture | None:
        picture = self._held.pop(key, None)
        self.size -= _size(picture) if picture is not None else 0
        return picture

    def put(self, key: Hashable, picture: Picture) -> list[Hashable]:
        """Returns the keys of those that had to go."""
        self._held[key] = picture
        self.size += _size(picture)
        gone = []
        while self.size > self.limit:
            first, old = self._held.popitem(last=False)
            self.size -= _size(old)
            gone.append(first)
        return gone


def _size(picture: Picture) -> int:
    return len(picture.data) + OVERHEAD
