"""Files for a batch service, of a run with links: as many of a parcel's requests as a file may hold with their images.

How large a request is with its images is known only when they are there. So the file is written first, up to the
limit, and the attempt takes what is in it; the rest goes next.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Self

import msgspec

from batchkit import calls
from batchkit.batches import Service
from batchkit.errors import RowError
from batchkit.handover import Cost
from batchkit.manifests import as_ranges
from batchkit.measures import Totals, request_tokens
from batchkit.parcels import Parcel
from batchkit.resolving import Resolver
from batchkit.runs import Run
from batchkit.storage import write_whole


class Packed(msgspec.Struct, kw_only=True):
    """`positions` are in the file, `rest` did not fit, and the requests of `faults` cannot be sent. The URLs that the
    file names hold `until` then; None where it names none."""

    shard: int
    positions: list[int]
    rest: list[int] = []
    faults: dict[int, RowError] = {}
    size: int = 0
    cost: Cost = Cost()
    until: str | None = None


class Packer:
    """`cost` gives what requests of these totals cost; `most` bounds a file, in bytes. A context manager: what was
    packed and not sent is removed at its end."""

    def __init__(
        self, run: Run, resolver: Resolver, service: Service, *, cost: Callable[[Totals], Cost], most: int
    ) -> None:
        self._run = run
        self._resolver = resolver
        self._service = service
        self._cost = cost
        self._most = most
        self._last: Packed | None = None
        self._size = most

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._last is not None:
            self.remove(self._last.shard)

    def holds(self, until: str | None) -> bool:
        """Whether URLs that hold until then hold as long as a batch may take that is created now."""
        return self._resolver.holds(until)

    def pack(self, parcel: Parcel) -> Packed:
        """Write the file; the same parcel again is there already, unless its URLs became too old while it waited."""
        shard = parcel.seal.shard
        last = self._last
        if last is None or (last.shard, last.positions) != (shard, parcel.positions) or not self.holds(last.until):
            if last is not None and last.shard != shard:
                self.remove(last.shard)
            last = self._last = self._write(parcel)
            self._size = last.size
        return msgspec.structs.replace(last, rest=[], faults={}) if last.positions == parcel.positions else last

    def file_of(self, shard: int, positions: list[int]) -> Path:
        """The file that holds these requests, and was packed last."""
        assert self._last is not None  # noqa: S101  # an attempt is made of what was packed
        assert (self._last.shard, self._last.positions) == (shard, positions)  # noqa: S101
        return self._path(shard)

    def remove(self, shard: int) -> None:
        """The file is not needed any more."""
        self._path(shard).unlink(missing_ok=True)
        self._last = None

    def shrink(self) -> int:
        """The last file was too large: half of its size is the most from here on. Returns that."""
        self._most = self._size = max(1, min(self._most, self._size) // 2)
        self._last = None
        return self._most

    def _path(self, shard: int) -> Path:
        return self._run.path / "uploads" / f"links-{shard:05d}.jsonl"  # as `clean_up` finds it

    def _write(self, parcel: Parcel) -> Packed:
        packed = Packed(shard=parcel.seal.shard, positions=[])
        totals, path = Totals(), self._path(parcel.seal.shard)
        with calls.storing(path.parent):
            path.parent.mkdir(exist_ok=True)
        lines = self._resolver.lines(parcel.seal, as_ranges(parcel.positions))
        with write_whole(path) as stream:
            for position, line, fault in lines:
                if fault is not None:
                    packed.faults[position] = fault
                    continue
                sent = self._service.request(line) + b"\n"
                size = max(len(sent), len(line) + 1)
                if packed.positions and packed.size + size > self._most:
                    packed.rest = [one for one in parcel.positions if one >= position]
                    break
                packed.until = packed.until or self._resolver.until  # of the first, which holds the shortest time
                packed.positions.append(position)
                packed.size += size
                totals.add(request_tokens(line, self._run.manifest.model))
                stream.write(sent)
        lines.close()
        packed.cost = self._cost(totals)
        return packed
