"""Stretches of local files, in whole lines: what processes can read side by side, and what need not be copied."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from batchkit.errors import InputError
from batchkit.storage import BLOCK_BYTES, BUFFER_BYTES, Readable, open_read, read_blocks


class Section(NamedTuple):
    """`size` bytes of a file from `start` on; None: to its end."""

    path: Path
    start: int = 0
    size: int | None = None


def cut(path: Path, size: int) -> Iterator[Section]:
    """A file in sections of whole lines, each of at least `size` bytes, and of no more than a line beyond them. What is
    appended meanwhile is left out."""
    with open_read(str(path), BLOCK_BYTES) as stream:
        start, end = 0, stream.seek(0, os.SEEK_END)
        while start < end:
            stream.seek(min(start + size, end) - 1)
            stream.readline()
            stop = min(stream.tell(), end)
            yield Section(path, start, stop - start)
            start = stop


def read(section: Section) -> Iterator[bytes]:
    """The section in blocks of whole lines; the last one may lack its line feed. Raises `InputError`."""
    if section.size is None:
        with open_read(str(section.path)) as stream:
            yield from read_blocks(stream)
    elif section.size:
        try:
            # Not `open_read`: a shard may have hundreds of small sections.
            stream = open(section.path, "rb", buffering=0)  # noqa: SIM115  # it is closed below
        except OSError as exc:
            raise InputError(f"{section.path}: cannot be opened: {exc.strerror}", hint="check the path") from exc
        with stream:
            stream.seek(section.start)
            yield from read_blocks(_Bounded(stream, section.size))


def load(section: Section) -> bytes:
    return b"".join(read(section))


def copied(uri: str, paths: Iterator[Path], size: int) -> Iterator[Section]:
    """The same of a file that cannot be sought in: each section is a copy, for which there is the next of `paths`."""
    with open_read(uri) as stream:
        blocks = read_blocks(stream)
        for block in blocks:
            path, written = next(paths), 0
            with open(path, "wb", BUFFER_BYTES) as copy:
                for piece in itertools.chain([block], blocks):
                    written += copy.write(piece)
                    if written >= size:
                        break
            yield Section(path, 0, written)


def changed(path: Path) -> InputError:
    """The error about a file that is no longer what it was when it was read first."""
    return InputError(f"{path}: was changed while it was merged", hint="run the same command again")


class _Bounded:
    def __init__(self, stream: Readable, size: int) -> None:
        self._stream = stream
        self._left = size

    def read(self, size: int, /) -> bytes:
        piece = self._stream.read(min(size, self._left)) or b""
        self._left -= len(piece)
        return piece
