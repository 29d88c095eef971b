"""Where a run is cut into shards: a pure function of the request sizes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator


class Cutter:
    """Gives each row, in order, the number of its shard.

    A shard takes as many rows as fit: at most `max_requests` rows (rejected ones count too, so that a shard of nothing
    but rejected rows stays small) and `max_bytes` bytes. One request that is larger than `max_bytes` gets a shard for
    itself: rejecting it is the caller's decision.
    """

    def __init__(self, *, max_requests: int, max_bytes: int) -> None:
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._shard = self._rows = self._held = 0
        self._asked: dict[Hashable, int] = {}

    def place(self, size: int, asks: Hashable | None = None) -> tuple[int, int | None]:
        """The shard of the next row. `size` is the bytes of its request line, line feed included; 0 where it became no
        request. `asks` is what the request asks, None where it is like no other.

        With it comes, for a row that asks what another of its shard asks, how many rows before it the first of these
        is. Such a row counts as a row and takes no bytes.
        """
        first = self._asked.get(asks) if asks is not None else None
        if self._rows and (self._rows >= self._max_requests or (first is None and self._held + size > self._max_bytes)):
            self._shard += 1
            self._rows = self._held = 0
            self._asked.clear()
            first = None
        if first is None:
            self._held += size
            if asks is not None:
                self._asked[asks] = self._rows
        back = None if first is None else self._rows - first
        self._rows += 1
        return self._shard, back


def pack(sizes: Iterable[int], *, max_requests: int, max_bytes: int) -> Iterator[int]:
    """For each of `sizes` in order, the number of its shard."""
    cutter = Cutter(max_requests=max_requests, max_bytes=max_bytes)
    return (cutter.place(size)[0] for size in sizes)
