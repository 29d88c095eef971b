"""Where a run is cut into shards: a pure function of the request sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


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

    def shard_of(self, size: int) -> int:
        """`size` is the bytes of the next row's request line, line feed included; 0 where it became no request."""
        if self._rows and (self._rows >= self._max_requests or self._held + size > self._max_bytes):
            self._shard += 1
            self._rows = self._held = 0
        self._rows += 1
        self._held += size
        return self._shard


def pack(sizes: Iterable[int], *, max_requests: int, max_bytes: int) -> Iterator[int]:
    """For each of `sizes` in order, the number of its shard."""
    cutter = Cutter(max_requests=max_requests, max_bytes=max_bytes)
    return map(cutter.shard_of, sizes)
