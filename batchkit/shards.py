"""Where a run is cut into shards: a pure function of the request sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def pack(sizes: Iterable[int], *, max_requests: int, max_bytes: int) -> Iterator[int]:
    """For each row in order, the number of its shard.

    `sizes` are the bytes of the request lines, line feed included; 0 for a row that became no request. A shard takes as
    many rows as fit: at most `max_requests` rows (rejected ones count too, so that a shard of nothing but rejected rows
    stays small) and `max_bytes` bytes. One request that is larger than `max_bytes` gets a shard for itself: rejecting
    it is the caller's decision.
    """
    shard = rows = held = 0
    for size in sizes:
        if rows and (rows >= max_requests or held + size > max_bytes):
            shard += 1
            rows = held = 0
        rows += 1
        held += size
        yield shard
