"""Lines on disk, divided into partitions by a hash of a key: for joins that are larger than memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path

import xxhash

from batchkit.sections import Section, read

BUFFERED_BYTES = 8 << 20
"""So much is held back in all before it is appended to the partitions' files."""


def partitions_of(keys: Iterable[str], count: int) -> list[int]:
    """Which of `count` partitions each key belongs to, the same one in every process."""
    if count == 1:
        return [0 for _ in keys]
    digest = xxhash.xxh3_64_intdigest
    return [digest(key.encode()) % count for key in keys]


class Partitions:
    """Lines with their line feeds in `count` files in `folder`, which keep the order in which they came.

    Few files are open at a time, however many there are.
    """

    def __init__(self, folder: Path, name: str, count: int) -> None:
        self.paths = [folder / f"{name}-{number}" for number in range(count)]
        self._pieces: list[list[bytes]] = [[] for _ in range(count)]
        self._held = 0

    def add(self, lines: Sequence[bytes]) -> None:
        """Append one to each partition; an empty one is none."""
        for pieces, line in zip(self._pieces, lines, strict=True):
            if line:
                pieces.append(line)
        self._held += sum(map(len, lines))
        if self._held > BUFFERED_BYTES:
            self.flush()

    def flush(self) -> None:
        for path, pieces in zip(self.paths, self._pieces, strict=True):
            if pieces:
                with open(path, "ab") as stream:
                    stream.write(b"".join(pieces))
                pieces.clear()
        self._held = 0


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of one partition; of one in which nothing is, none."""
    if path.exists():
        for block in read(Section(path)):
            yield from BytesIO(block)
