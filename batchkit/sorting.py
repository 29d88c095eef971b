"""A task file and a pile of responses → shards like those of a run, in a folder aside: what `merge` then takes alike.

1. The rows are written down in shards, as they come; their ids go into partitions by a hash.
2. The responses go into the same partitions, by their custom_ids.
3. Partition after partition: the ids in memory say which shard each response belongs to, and which rows repeat an id.

Memory is that of one partition's ids. A pile of one partition is not divided: its responses go to their shards at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import msgspec
import xxhash

from batchkit.errors import RowError
from batchkit.manifests import OUR_NAMES, Rejection, Seal
from batchkit.outcomes import ShardFiles
from batchkit.responses import UnreadableLine, parse
from batchkit.sheets import Sheet
from batchkit.spills import Partitions
from batchkit.storage import BLOCK_BYTES, BUFFER_BYTES
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


class _Keyed(msgspec.Struct, gc=False):
    custom_id: str


_decode_key = msgspec.json.Decoder(_Keyed).decode
_decode_id = msgspec.json.Decoder(tuple[int, int, str]).decode
_decode_rejection = msgspec.json.Decoder(Rejection).decode
_encode = msgspec.json.Encoder().encode
_encode_lines = msgspec.json.Encoder().encode_lines
_NOT_COMMON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


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
        shard, last = len(self._seals), first.position + SHARD_ROWS - 1
        names: set[str] = set()
        raws: list[bytes] = []
        ids: list[str] = []
        size = held = 0
        with _Hashed(self._path("rows", shard)) as rows_file, _Hashed(self._path("ids", shard)) as ids_file:
            for row in itertools.chain([first], rows):  # the last one is wanted
                raws.append(row.raw)
                ids.append(self._enter(row, shard, names))
                held += len(row.raw)
                ends = row.position == last or size + held > SHARD_BYTES
                if ends or held > BLOCK_BYTES:
                    rows_file.write_lines(raws)
                    ids_file.write(_encode_lines(ids))
                    ids.clear()
                    size, held = size + held, 0
                if ends:
                    break
            rows_file.write_lines(raws)
            ids_file.write(_encode_lines(ids))
        return Seal(
            shard=shard,
            start=first.position,
            end=row.position + 1,
            requests=0,
            rejected=[],
            rows_bytes=size + held,
            requests_bytes=0,
            pixels=0,
            rows_checksum=rows_file.checksum,
            ids_checksum=ids_file.checksum,
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
            if not _OUR_NAMES.isdisjoint(fields):
                names |= _OUR_NAMES & fields.keys()
            custom_id = self._custom_id(row.raw, fields)
        except RowError as exc:
            message = f"{self._tasks}:{row.line}: {exc.message}"
            found = Rejection(position=row.position, line=row.line, custom_id="", code=exc.code, message=message)
            self._reject(shard, found)
            return ""
        place = row.line * _SHARDS + shard
        if self._partitions > 1:
            self._ids.add(custom_id, _encode((place, row.position, custom_id)) + b"\n")
        elif (known := self._known.setdefault(custom_id, place)) != place:
            self._reject_repeated(known, place, row.position, custom_id)
        return custom_id

    def _reject_repeated(self, first: int, place: int, position: int, custom_id: str) -> None:
        line, shard = divmod(place, _SHARDS)
        message = f"{self._tasks}:{line}: the same id as line {first // _SHARDS}: {custom_id}"
        found = Rejection(position=position, line=line, custom_id=custom_id, code="duplicate", message=message)
        self._reject(shard, found)

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

    def take_lines(self, blocks: Iterable[list[bytes]], sheet: Sheet) -> None:
        """Give each response to the shard of its row; lines of no row go to `sheet`. All have their line feeds."""
        answers = Partitions(self._folder, "responses", self.count)
        if self._partitions == 1:
            self._give(blocks, answers, sheet)
        else:
            self._give_in_partitions(blocks, answers, sheet)
        answers.flush()
        self._flush_rejected()
        self._known.clear()

    def _give_in_partitions(self, blocks: Iterable[list[bytes]], answers: Partitions, sheet: Sheet) -> None:
        divided = Partitions(self._folder, "hashed-lines", self._partitions)
        for line in itertools.chain.from_iterable(blocks):
            try:
                divided.add(_key(line), line)
            except UnreadableLine:
                _add_stray(sheet, line)
        divided.flush()
        for number in range(self._partitions):
            for entry in self._ids.lines(number):
                place, position, custom_id = _decode_id(entry)
                if (first := self._known.setdefault(custom_id, place)) != place:
                    self._reject_repeated(first, place, position, custom_id)
            self._give(divided.blocks(number), answers, sheet)
            self._known.clear()
            self._ids.drop(number)
            divided.drop(number)

    def _give(self, blocks: Iterable[list[bytes]], answers: Partitions, sheet: Sheet) -> None:
        find, decode = self._known.get, _decode_key
        for lines in blocks:
            pieces = answers.pieces
            for line in lines:
                try:
                    place = find(decode(line).custom_id)
                except _NOT_COMMON:
                    place = self._find_other(line)
                if place is not None:
                    pieces[place % _SHARDS].append(line)
                else:
                    _add_stray(sheet, line)
            answers.grew(sum(map(len, lines)))

    def _find_other(self, line: bytes) -> int | None:
        try:
            return self._known.get(parse(line).custom_id)
        except UnreadableLine:
            return None

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
    except _NOT_COMMON:
        return parse(line).custom_id


def _add_stray(sheet: Sheet, line: bytes) -> None:
    """A line of no row: a response, or something that is none (a request, say, has an id, too)."""
    bare = line.removesuffix(b"\n")
    try:
        parse(line)
    except UnreadableLine:
        sheet.add_strays((), [bare])
    else:
        sheet.add_strays([bare], ())


class _Hashed:
    """A file that is written once, and its checksum."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = xxhash.xxh3_128()

    def __enter__(self) -> Self:
        self._stream = open(self._path, "wb", BUFFER_BYTES)  # it is closed when the block ends
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    @property
    def checksum(self) -> str:
        return str(self._digest.hexdigest())

    def write(self, lines: bytes) -> None:
        self._stream.write(lines)
        self._digest.update(lines)

    def write_lines(self, lines: list[bytes]) -> None:
        """Write them, each with a line feed, and forget them."""
        if lines:
            self.write(b"\n".join(lines) + b"\n")
            lines.clear()
