"""Where a run is cut into shards: a pure function of the request sizes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator


def pack(sizes: Iterable[int], *, max_requests: int, max_bytes: int) -> Iterator[int]:
    """For each row in order, the number of its shard.

    `sizes` are the bytes of the request lines, line feed included; 0 for a row that became no request. A shard takes as
    many rows as fit: at most `max_requests` rows (rejected ones count too, so that a shard of nothing but rejected rows
    stays small) and `max_bytes` bytes. One request that is larger than `max_bytes` gets a shard for itself: rejecting
    it is the caller's decision.
    """
    entries = ((size, None) for size in sizes)
    return (shard for shard, _ in pack_distinct(entries, max_requests=max_requests, max_bytes=max_bytes))


def pack_distinct(
    requests: Iterable[tuple[int, Hashable | None]], *, max_requests: int, max_bytes: int
) -> Iterator[tuple[int, int | None]]:
    """As `pack`, of pairs: the size, and what the request asks (None: like no other). With the number of its shard
    comes, for a row that asks what another of its shard asks, how many rows before it the first of these is. Such a
    row counts as a row and takes no bytes."""
    shard = rows = held = 0
    asked: dict[Hashable, int] = {}
    for size, asks in requests:
        first = asked.get(asks) if asks is not None else None
        if rows and (rows >= max_requests or (first is None and held + size > max_bytes)):
            shard += 1
            rows = held = 0
            asked.clear()
            first = None
        if first is None:
            held += size
            if asks is not None:
                asked[asks] = rows
        yield shard, None if first is None else rows - first
        rows += 1
