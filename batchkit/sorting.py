"""A task file and a pile of responses → shards like those of a run, in a folder aside: what `merge` then takes alike.

1. `take_rows`: the rows are cut into shards; their ids go into partitions by a hash (`identities`).
2. `take_responses`: so do the custom_ids of the responses; partition after partition, the ids say which shard each
   response belongs to, and which rows repeat an id; then the responses go there (`routing`).

Sections of files and partitions are for the processes of a team. Here their findings are put together, in the order of
the files, so that these are the same however many processes there are.
"""

from __future__ import annotations

import itertools
import mmap
import operator
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Self

import msgspec

from batchkit import identities, routing, sections
from batchkit.identities import Fault, Found, Identity
from batchkit.inputs import Source
from batchkit.manifests import Rejection, Seal
from batchkit.outcomes import ShardFiles
from batchkit.routing import Divide, LookUp, ReadKeys
from batchkit.sections import Section
from batchkit.sheets import Sheet
from batchkit.spills import Partitions
from batchkit.storage import is_plain_local
from batchkit.teams import Team

ROWS_BYTES = 4 << 20
RESPONSES_BYTES = 32 << 20
LEAST_BYTES = 1 << 20
SHARES = 16
"""A section has a sixteenth of the rows, or of the responses, unless that is too much or too little."""
HELD_REJECTIONS = 10_000
"""So many are held back before they are written."""
UNANSWERED = "no file has a response to it"

_decode_rejection = msgspec.json.Decoder(Rejection).decode
_encode = msgspec.json.Encoder().encode


class Sorting:
    """The shards of one pile. `take_rows`, then `take_responses`, then `shards`."""

    def __init__(self, folder: Path, source: Source, identity: Identity, *, partitions: int, team: Team) -> None:
        self.rows = 0
        self._folder = folder
        self._source = source
        self._team = team
        self._setting = identities.Setting(folder, identity, partitions, identities.SHARD_ROWS)
        self._seals: list[Seal] = []
        self._rows: list[Section] = []
        self._ids_paths: list[Path] = []
        self._ids = Partitions(folder, "hashed-ids", partitions)
        self._rejected: dict[int, list[bytes]] = {}
        self._held = 0

    @property
    def count(self) -> int:
        """How many shards there are."""
        return len(self._seals)

    # -- rows --------------------------------------------------------------------------------------------------------

    def take_rows(self) -> None:
        source = self._source
        if source.format in ("jsonl", "batch") and is_plain_local(source.uri):
            cut = sections.cut(Path(source.uri.removeprefix("file://")), _share(source.size, ROWS_BYTES))
            orders = (identities.Order(self._setting, number, section) for number, section in enumerate(cut))
            line = 1
            with closing(self._team.in_order(orders, identities.find)) as made:
                for _, (found, lines) in made:
                    for one in found:
                        self._enter(one, line)
                    line += lines
        else:
            for one in identities.find_in_turn(self._setting, source.rows()):
                self._enter(one, 0)
        self._ids.flush()

    def _enter(self, found: Found, line: int) -> None:
        """Note a shard; its lines are counted from `line`."""
        shard, start = len(self._seals), self.rows
        self._seals.append(
            Seal(
                shard=shard,
                start=start,
                end=start + found.size,
                requests=0,
                rejected=[],
                rows_bytes=found.rows.size or 0,
                requests_bytes=0,
                pixels=0,
                rows_checksum=found.rows_checksum,
                ids_checksum=found.ids_checksum,
                requests_checksum="",
                next_line=0,
                next_offset=0,
                names_in_use=sorted(found.names),
            )
        )
        self.rows += found.size
        self._rows.append(found.rows)
        self._ids_paths.append(found.ids)
        self._ids.add([routing.entry(shard, start, line + found.line, keys) for keys in found.keys])
        for fault in found.faults:
            self._reject(shard, self._rejection(fault, start, line))

    def _rejection(self, fault: Fault, start: int, line: int) -> Rejection:
        line += fault.line
        message = f"{self._source.uri}:{line}: {fault.message}"
        return Rejection(position=start + fault.row, line=line, custom_id="", code=fault.code, message=message)

    def _reject(self, shard: int, found: Rejection) -> None:
        self._rejected.setdefault(shard, []).append(_encode(found) + b"\n")
        self._held += 1
        if self._held == HELD_REJECTIONS:
            self._flush_rejected()

    def _flush_rejected(self) -> None:
        for shard, lines in self._rejected.items():
            with open(self._path("rejected", shard), "ab") as stream:
                stream.writelines(lines)
        self._rejected.clear()
        self._held = 0

    # -- responses ---------------------------------------------------------------------------------------------------

    def take_responses(self, files: Iterable[str], sheet: Sheet, *, size: int) -> None:
        """Give each response to the shard of its row; lines of no row go to `sheet`. `size` is that of all files."""
        keys = Partitions(self._folder, "hashed-keys", self._setting.partitions)
        looked_up = [self._path("shards", number) for number in range(self._setting.partitions)]
        orders = self._read_keys(self._sections(files, _share(size, RESPONSES_BYTES)), keys, looked_up)
        self._look_up(keys, looked_up)
        with (
            closing(self._team.in_order(orders, routing.divide)) as made,
            open(self._folder / "places", "wb") as places,
        ):
            for order, divided in made:
                places.write(divided.offsets)
                strays = sections.read(Section(order.strays)) if divided.unexpected or divided.unreadable else ()
                sheet.take_strays(strays, unexpected=divided.unexpected, unreadable=divided.unreadable)
                order.strays.unlink(missing_ok=True)
                order.short.path.unlink()
        for path in looked_up:
            path.unlink()
        self._flush_rejected()

    def _sections(self, files: Iterable[str], size: int) -> Iterator[Section]:
        """The response files in sections. What cannot be sought in is copied, section by section."""
        copies = (self._path("copied", number) for number in itertools.count())
        for name in files:
            if is_plain_local(name):
                yield from sections.cut(Path(name.removeprefix("file://")), size)
            else:
                yield from sections.copied(name, copies, size)

    def _read_keys(self, cut: Iterable[Section], keys: Partitions, looked_up: list[Path]) -> list[Divide]:
        """Put the custom_ids of all sections into partitions, and order what is to be done when they are looked up."""
        path, partitions = self._folder / "routes", self._setting.partitions
        before = [0] * partitions
        orders: list[Divide] = []
        asked = (
            # A copy is not written once more: so little more is on the disk than there is to sort.
            ReadKeys(one, partitions, self._path("short", number) if one.path.parent != self._folder else None)
            for number, one in enumerate(cut)
        )
        with closing(self._team.in_order(asked, routing.read_keys)) as made, open(path, "wb") as routes:
            for (section, _, _), found in made:
                keys.add(found.keys)
                start = routes.tell()
                size = routes.write(routing.directions(before, found))
                before = list(map(operator.add, before, found.counts))
                names = self._path("lines", len(orders)), self._path("strays", len(orders))
                orders.append(
                    Divide(
                        section, found.checksum, found.short, Section(path, start, size), looked_up, self.count, *names
                    )
                )
        keys.flush()
        return orders

    def _look_up(self, keys: Partitions, looked_up: list[Path]) -> None:
        """Write down the shards of the custom_ids of each partition, in their order."""
        orders = [
            LookUp(*paths, self._path("repeated", number), self._source.uri)
            for number, paths in enumerate(zip(self._ids.paths, keys.paths, looked_up, strict=True))
        ]
        with closing(self._team.in_order(orders, routing.look_up)) as made:
            for order, _ in made:
                for shard, found in routing.read_repeated(order.repeated):
                    self._reject(shard, found)
                for path in (order.ids, order.keys, order.repeated):
                    path.unlink(missing_ok=True)

    # -- shards ------------------------------------------------------------------------------------------------------

    def shards(self) -> Iterator[ShardFiles]:
        with _Places(self._folder / "places", self.count) as places:
            for seal, rows, ids in zip(self._seals, self._rows, self._ids_paths, strict=True):
                rejected = self._path("rejected", seal.shard)
                lines = rejected.read_bytes().split(b"\n")[:-1] if rejected.exists() else []
                responses = [
                    (1, Section(self._path("lines", part), start, size)) for part, start, size in places.of(seal.shard)
                ]
                sealed = msgspec.structs.replace(seal, rejected=list(map(_decode_rejection, lines)))
                yield ShardFiles(sealed, rows, ids, responses, [], UNANSWERED)

    def _path(self, kind: str, number: int) -> Path:
        return self._folder / f"{kind}-{number}"


class _Places:
    """The file of what each `routing.divide` says of where the lines of each shard are: too much to hold in memory."""

    def __init__(self, path: Path, shards: int) -> None:
        self._path = path
        self._width = shards + 1
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._offsets: Any = array("Q")
        if self._path.stat().st_size:
            with open(self._path, "rb") as stream:
                mapped = self._stack.enter_context(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
            self._offsets = self._stack.enter_context(self._stack.enter_context(memoryview(mapped)).cast("Q"))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def of(self, shard: int) -> Iterator[tuple[int, int, int]]:
        """Number, start and size of all parts with lines of this shard."""
        starts, ends = self._offsets[shard :: self._width], self._offsets[shard + 1 :: self._width]
        for part, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            if start < end:
                yield part, start, end - start


def _share(size: int, most: int) -> int:
    """How large a section of files of this size is: so small that there are enough for several processes."""
    return max(LEAST_BYTES, min(most, size // SHARES))
