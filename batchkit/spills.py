"""Lines on disk, divided into partitions by a hash of a key or by a number.

For joins that are larger than memory. Few files are open at a time, however many partitions there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import xxhash

BUFFERED_BYTES = 16 << 20
"""So much is held back in all before it is appended to the partitions' files."""
_READ_BYTES = 1 << 16


class Partitions:
    """Lines (without a line feed in them) in `count` files in `folder`, which keep the order of `add`."""

    def __init__(self, folder: Path, name: str, count: int) -> None:
        self._paths = [folder / f"{name}-{number}" for number in range(count)]
        self._pieces: list[list[bytes]] = [[] for _ in range(count)]
        self._held = 0

    def add(self, key: str, line: bytes) -> None:
        """Put `line` into the partition that `key` belongs to: the same one for every `Partitions` of this count."""
        self.put(xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogatepass")) % len(self._paths), line)

    def put(self, number: int, line: bytes) -> None:
        """Put `line` into the partition of this number."""
        self._pieces[number] += (line, b"\n")
        self._held += len(line) + 100
        if self._held > BUFFERED_BYTES:
            self.flush()

    def flush(self) -> None:
        for path, pieces in zip(self._paths, self._pieces, strict=True):
            if pieces:
                with open(path, "ab") as stream:
                    stream.write(b"".join(pieces))
                pieces.clear()
        self._held = 0

    def lines(self, number: int) -> Iterator[bytes]:
        """The lines of one partition, after `flush`."""
        path = self._paths[number]
        return read_back(path) if path.exists() else iter(())

    def drop(self, number: int) -> None:
        self._paths[number].unlink(missing_ok=True)


def read_back(path: Path) -> Iterator[bytes]:
    with open(path, "rb", buffering=_READ_BYTES) as stream:
        for line in stream:
            yield line[:-1]
