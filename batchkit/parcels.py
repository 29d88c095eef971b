"""The requests of a shard that are due, cut into what one batch takes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import msgspec

from batchkit.endpoints import endpoint_at
from batchkit.limits import Limits
from batchkit.manifests import Seal, as_ranges
from batchkit.runs import Run
from batchkit.shardfiles import request_lines
from batchkit.shards import pack


class Parcel(msgspec.Struct, frozen=True, kw_only=True):
    """What one batch takes: requests of one shard to one endpoint, `size` bytes in all. `positions` are their rows."""

    seal: Seal
    positions: list[int]
    url: str
    size: int


class _Addressed(msgspec.Struct):
    url: str


_decode = msgspec.json.Decoder(_Addressed).decode


def first_url(run: Run, seals: Sequence[Seal]) -> str:
    """The endpoint of the first request, empty where there is none. A damaged file is told of when it is sent."""
    for seal in seals:
        with contextlib.suppress(OSError, ValueError), open(run.fetch(run.requests_path(seal.shard)), "rb") as stream:
            if line := stream.readline():
                return _decode(line).url
    return ""


def pooling(run: Run, seals: Sequence[Seal]) -> str | None:
    """vLLM's word for what the requests ask of a model that generates nothing. Of requests that came as they are the
    first one tells it: one model either generates or does not."""
    endpoint = endpoint_at(first_url(run, seals) if is_foreign(run) else run.manifest.url)
    return endpoint.pooling if endpoint is not None else None


def cut(run: Run, seal: Seal, positions: Sequence[int], limits: Limits) -> list[Parcel]:
    """The requests at `positions` (ascending) within `limits`, each parcel to a single endpoint.

    Raises `RunError` where the requests are not those that were sealed.
    """
    if not positions:
        return []
    whole = len(positions) == seal.requests and seal.requests <= limits.max_requests
    if whole and seal.requests_bytes <= limits.max_bytes and not is_foreign(run):
        return [Parcel(seal=seal, positions=list(positions), url=run.manifest.url, size=seal.requests_bytes)]
    mixed = is_foreign(run)
    sizes: dict[str, list[tuple[int, int]]] = {}
    for position, line in zip(positions, request_lines(run, seal, as_ranges(positions)), strict=True):
        sizes.setdefault(_decode(line).url if mixed else run.manifest.url, []).append((position, len(line)))
    return [parcel for url, entries in sizes.items() for parcel in _packed(seal, url, entries, limits)]


def is_foreign(run: Run) -> bool:
    """Whether the requests came as they are: they may go to several endpoints, and be spelled in any way."""
    return run.manifest.options.get("input_format") == "batch"


def _packed(seal: Seal, url: str, entries: Sequence[tuple[int, int]], limits: Limits) -> Iterator[Parcel]:
    numbers = pack((size for _, size in entries), max_requests=limits.max_requests, max_bytes=limits.max_bytes)
    for _, group in itertools.groupby(zip(numbers, entries, strict=True), key=lambda pair: pair[0]):
        part = [entry for _, entry in group]
        yield Parcel(seal=seal, positions=[position for position, _ in part], url=url, size=sum(s for _, s in part))
