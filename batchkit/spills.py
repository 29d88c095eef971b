"""Lines on disk, divided into partitions by a hash of a key or by a number.

For joins that are larger than memory. Few files are open at a time, however many partitions there are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import xxhash

from batchkit.storage import read_blocks

BUFFERED_BYTES = 16 << 20
"""So much is held back in all before it is appended to the partitions' files."""


class Partitions:
    """Lines with their line feeds in `count` files in `folder`, which keep the order in which they came.

    What is put into `pieces` directly is told by `grew`, in bytes; behind that call the lists are others, perhaps.
    """

    def __init__(self, folder: Path, name: str, count: int) -> None:
        self._paths = [folder / f"{name}-{number}" for number in range(count)]
        self.pieces: list[list[bytes]] = [[] for _ in range(count)]
        self._held = 0

    def add(self, key: str, line: bytes) -> None:
        """Put `line` into the partition that `key` belongs to: the same one for every `Partitions` of this count."""
        number = xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogatepass")) % len(self._paths)
        self.pieces[number].append(line)
        self.grew(len(line))

    def grew(self, size: int) -> None:
        self._held += size + 60
        if self._held > BUFFERED_BYTES:
            self.flush()

    def flush(self) -> None:
        for path, pieces in zip(self._paths, self.pieces, strict=True):
            if pieces:
                with open(path, "ab", buffering=0) as stream:
                    stream.write(b"".join(pieces))
                pieces.clear()
        self._held = 0

    def lines(self, number: int) -> Iterator[bytes]:
        """The lines of one partition, after `flush`."""
        return itertools.chain.from_iterable(self.blocks(number))

    def blocks(self, number: int) -> Iterator[list[bytes]]:
        """The same, many at a time."""
        path = self._paths[number]
        if path.exists():
            with open(path, "rb") as stream:
                for block in read_blocks(stream):
                    yield BytesIO(block).readlines()

    def drop(self, number: int) -> None:
        self._paths[number].unlink(missing_ok=True)
