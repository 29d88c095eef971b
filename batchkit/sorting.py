"""A task file and a pile of responses → shards like those of a run, in a folder aside: what `merge` then takes alike.

1. The rows are written down in shards, as they come; their ids go into partitions by a hash.
2. The responses go into the same partitions, by their custom_ids.
3. Partition after partition: the ids in memory say which shard each response belongs to, and which rows repeat an id.

Memory is that of one partition's ids. A pile of one partition is not divided: its responses go to their shards at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import xxhash

from batchkit.errors import RowError
from batchkit.outcomes import ShardFiles
from batchkit.responses import UnreadableLine, parse
from batchkit.runs import OUR_NAMES, Rejection, Seal
from batchkit.sheets import Sheet
from batchkit.spills import Partitions
from batchkit.storage import BUFFER_BYTES
from batchkit.tasks import Row, parse_object

SHARD_ROWS = 10_000
SHARD_BYTES = 32 << 20
"""Rows of a shard: it ends at either."""
HELD_REJECTIONS = 10_000
"""So many are held back before they are written."""
UNANSWERED = "no file has a response to it"

_SHARDS = 1 << 24
_OUR_NAMES = frozenset(OUR_NAMES)

CustomId = Callable[[bytes, Mapping[str, Any]], str]
"""The custom_id of a row, by its bytes and its fields; raises `RowError` where it has none."""


class _Id(NamedTuple):
    """`place` is the line in the task file and the shard, as one number: so many of them are in memory."""

    place: int
    position: int
    custom_id: str


class _Keyed(msgspec.Struct, gc=False):
    custom_id: str


_decode_key = msgspec.json.Decoder(_Keyed).decode
_decode_id = msgspec.json.Decoder(_Id).decode
_decode_rejection = msgspec.json.Decoder(Rejection).decode
_encode = msgspec.json.Encoder().encode


class Sorting:
    """The shards of one pile. `take_rows`, then `take_lines`, then `shards`."""

    def __init__(self, folder: Path, tasks: str, custom_id: CustomId, partitions: int) -> None:
        self.rows = 0
        self._folder = folder
        self._tasks = tasks
        self._custom_id = custom_id
        self._partitions = partitions
        self._seals: list[Seal] = []
        self._known: dict[str, int] = {}
        """The first row of each id of the partition at hand."""
        self._ids = Partitions(folder, "hashed-ids", partitions)
        self._rejected: dict[int, list[bytes]] = {}
        self._held = 0

    @property
    def count(self) -> int:
        """How many shards there are."""
        return len(self._seals)

    # -- rows --------------------------------------------------------------------------------------------------------

    def take_rows(self, rows: Iterable[Row]) -> None:
        rows = iter(rows)
        while (first := next(rows, None)) is not None:
            self._seals.append(self._write_shard(first, rows))
        self._ids.flush()
        self.rows = self._seals[-1].end if self._seals else 0

    def _write_shard(self, first: Row, rows: Iterator[Row]) -> Seal:
        shard, size, row = len(self._seals), 0, first
        names: set[str] = set()
        digests = xxhash.xxh3_128(), xxhash.xxh3_128()
        paths = self._path("rows", shard), self._path("ids", shard)
        with open(paths[0], "wb", BUFFER_BYTES) as kept, open(paths[1], "wb", BUFFER_BYTES) as ids:
            while True:
                line, custom_id = row.raw + b"\n", _encode(self._enter(row, shard, names)) + b"\n"
                kept.write(line)
                ids.write(custom_id)
                digests[0].update(line)
                digests[1].update(custom_id)
                size += len(line)
                if row.position - first.position == SHARD_ROWS - 1 or size > SHARD_BYTES:
                    break
                if (following := next(rows, None)) is None:
                    break
                row = following
        return Seal(
            shard=shard,
            start=first.position,
            end=row.position + 1,
            requests=0,
            rejected=[],
            rows_bytes=size,
            requests_bytes=0,
            pixels=0,
            rows_checksum=digests[0].hexdigest(),
            ids_checksum=digests[1].hexdigest(),
            requests_checksum="",
            next_line=0,
            next_offset=0,
            names_in_use=sorted(names),
        )

    def _enter(self, row: Row, shard: int, names: set[str]) -> str:
        """Note the id of a row; return it, or nothing where the row is rejected."""
        try:
            if row.fault is not None:
                raise RowError(*row.fault)
            fields = parse_object(row.raw)
            names |= _OUR_NAMES & fields.keys()
            custom_id = self._custom_id(row.raw, fields)
        except RowError as exc:
            message = f"{self._tasks}:{row.line}: {exc.message}"
            found = Rejection(position=row.position, line=row.line, custom_id="", code=exc.code, message=message)
            self._reject(shard, found)
            return ""
        entry = _Id(row.line * _SHARDS + shard, row.position, custom_id)
        if self._partitions == 1:
            self._enter_id(entry)
        else:
            self._ids.add(custom_id, _encode(entry))
        return custom_id

    def _enter_id(self, entry: _Id) -> None:
        first = self._known.setdefault(entry.custom_id, entry.place)
        if first != entry.place:
            line, shard = divmod(entry.place, _SHARDS)
            message = f"{self._tasks}:{line}: the same id as line {first // _SHARDS}: {entry.custom_id}"
            name = entry.custom_id
            self._reject(
                shard,
                Rejection(position=entry.position, line=line, custom_id=name, code="duplicate", message=message),
            )

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

    def take_lines(self, lines: Iterable[bytes], sheet: Sheet) -> None:
        """Give each response to the shard of its row; lines of no row go to `sheet`."""
        answers = Partitions(self._folder, "responses", self.count)
        if self._partitions == 1:
            self._give(lines, answers, sheet)
        else:
            self._give_in_partitions(lines, answers, sheet)
        answers.flush()
        self._flush_rejected()
        self._known.clear()

    def _give_in_partitions(self, lines: Iterable[bytes], answers: Partitions, sheet: Sheet) -> None:
        divided = Partitions(self._folder, "hashed-lines", self._partitions)
        for line in lines:
            try:
                divided.add(_key(line), line)
            except UnreadableLine:
                sheet.add_strays((), [line])
        divided.flush()
        for number in range(self._partitions):
            for entry in self._ids.lines(number):
                self._enter_id(_decode_id(entry))
            self._give(divided.lines(number), answers, sheet)
            self._known.clear()
            self._ids.drop(number)
            divided.drop(number)

    def _give(self, lines: Iterable[bytes], answers: Partitions, sheet: Sheet) -> None:
        find, put = self._known.get, answers.put
        for line in lines:
            try:
                place = find(_key(line))
                if place is not None:
                    put(place % _SHARDS, line)
                else:
                    parse(line)  # a request, say, has an id, too
                    sheet.add_strays([line], ())
            except UnreadableLine:
                sheet.add_strays((), [line])

    # -- shards ------------------------------------------------------------------------------------------------------

    def shards(self) -> Iterator[ShardFiles]:
        for seal in self._seals:
            rejected = self._path("rejected", seal.shard)
            lines = rejected.read_bytes().split(b"\n")[:-1] if rejected.exists() else []
            responses = self._path("responses", seal.shard)
            yield ShardFiles(
                msgspec.structs.replace(seal, rejected=list(map(_decode_rejection, lines))),
                self._path("rows", seal.shard),
                self._path("ids", seal.shard),
                [(1, responses)] if responses.exists() else [],
                [],
                UNANSWERED,
            )

    def _path(self, kind: str, shard: int) -> Path:
        return self._folder / f"{kind}-{shard}"


def _key(line: bytes) -> str:
    try:
        return _decode_key(line).custom_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return parse(line).custom_id
