"""Rows of a task file that no run knows → shards of them with their ids, to be joined with responses by these.

The rows of a plain JSONL file stay where they are: a shard of them is a section of that file, so that processes can
read it side by side. Where one is cut depends on the file alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import xxhash

from batchkit.errors import RowError
from batchkit.jsonl import BOM
from batchkit.manifests import OUR_NAMES
from batchkit.sections import Section, load
from batchkit.spills import partitions_of
from batchkit.tasks import Row, parse_object

SHARD_ROWS = 10_000
SHARD_BYTES = 4 << 20
"""Rows of a shard that are not in a section: it ends at either."""
_AT_ONCE = 500
"""Rows that are decoded together: so few that little memory is used again and again."""
_OUR_NAMES = frozenset(OUR_NAMES)

_decode = msgspec.json.Decoder().decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode
_encode_lines = msgspec.json.Encoder().encode_lines
_NOT_COMMON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError)


class Identity(NamedTuple):
    """What the custom_id of a row is: the text of these fields, joined with the separator."""

    names: tuple[str, ...]
    separator: str

    def of(self, raw: bytes, fields: Mapping[str, Any]) -> str:
        """That of one row. Raises `RowError` where it has none."""
        return self.separator.join([_id_text(name, fields.get(name), raw) for name in self.names])


def _id_text(name: str, value: Any, raw: bytes) -> str:
    if value is None:
        raise RowError("field", f"id field {name!r} is missing")
    if isinstance(value, str):
        return value
    if isinstance(value, (list, dict)):
        raise RowError("field", f"id field {name!r} is neither text nor a number")
    return bytes(_decode_fields(raw)[name]).decode()  # 1.50 and 1e3 stay what they are


class Setting(NamedTuple):
    """What is the same for all rows. The ids go into so many `partitions`."""

    folder: Path
    identity: Identity
    partitions: int
    shard_rows: int


class Order(NamedTuple):
    """A section of a task file, whose rows are wanted."""

    setting: Setting
    number: int
    section: Section


class Fault(NamedTuple):
    """Why the row at `row` of a shard, counted from 0, is rejected."""

    row: int
    line: int
    code: str
    message: str


class Found(NamedTuple):
    """The rows of a shard. `ids` has one line for each. `line` is that of the first, `faults` have theirs, from 0 in
    their section. `keys` are for the partitions, one JSON text for each: the `Keys` of rows without a fault."""

    rows: Section
    rows_checksum: str
    size: int
    line: int
    ids: Path
    ids_checksum: str
    names: set[str]
    faults: list[Fault]
    keys: list[bytes]


class Keys(NamedTuple):
    """Ids of rows, the rows by their index in the shard, and their lines; None: each is as far from the first line as
    the index says."""

    indices: list[int]
    lines: list[int] | None
    ids: list[str]


def find(order: Order) -> tuple[list[Found], int]:
    """The shards of a section of a JSONL file, and how many lines it has."""
    setting, number, section = order
    content = load(section)
    rows = BytesIO(content).readlines()
    count = len(rows)
    numbers: Sequence[int] = range(count)
    marked = section.start == 0 and content.startswith(BOM)
    if marked:
        rows[0] = rows[0].removeprefix(BOM)
    if marked or not content.endswith(b"\n") or not all(map(bytes.strip, rows)):
        numbers = [place for place, row in enumerate(rows) if row.strip()]
        rows = [rows[place].removesuffix(b"\n") + b"\n" for place in numbers]
        content = b"".join(rows)
        section = _write(setting.folder / f"rows-{number}", content)
    shards = -(-len(rows) // setting.shard_rows)
    found, start = [], 0
    for shard in range(shards):
        here = slice(len(rows) * shard // shards, len(rows) * (shard + 1) // shards)
        size = sum(map(len, rows[here]))
        at = Section(section.path, section.start + start, size), _checksum(content, start, size)
        found.append(_shard(setting, f"{number}-{shard}", at, rows[here], numbers[here], known={}))
        start += size
    return found, count


def _checksum(content: bytes, start: int, size: int) -> str:
    return xxhash.xxh3_128_hexdigest(memoryview(content)[start : start + size])


def find_in_turn(setting: Setting, rows: Iterable[Row]) -> Iterator[Found]:
    """The shards of a task file of any format, as its rows come; they are written aside."""
    rows = iter(rows)
    for shard in itertools.count():
        some = list(_take(rows, setting.shard_rows))
        if not some:
            return
        raws = [row.raw + b"\n" for row in some]
        faults = {index: row.fault for index, row in enumerate(some) if row.fault is not None}
        content = b"".join(raws)
        at = _write(setting.folder / f"rows-{shard}", content), xxhash.xxh3_128_hexdigest(content)
        yield _shard(setting, str(shard), at, raws, [row.line for row in some], known=faults)


def _take(rows: Iterator[Row], most: int) -> Iterator[Row]:
    size = 0
    for row in itertools.islice(rows, most):
        yield row
        size += len(row.raw)
        if size > SHARD_BYTES:
            return


def _write(path: Path, content: bytes) -> Section:
    path.write_bytes(content)
    return Section(path, 0, len(content))


def _shard(
    setting: Setting,
    name: str,
    at: tuple[Section, str],
    rows: list[bytes],
    numbers: Sequence[int],
    *,
    known: Mapping[int, tuple[str, str]],
) -> Found:
    """One shard: these rows, with their line feeds, in these lines. They are `at` a section with a checksum; `known`
    are faults that were found before."""
    ids: list[str] = []
    names: set[str] = set()
    faults: list[Fault] = []
    for start in range(0, len(rows), _AT_ONCE):
        some = rows[start : start + _AT_ONCE]
        common = _common_ids(some, setting.identity, names) if not known else None
        if common is not None:
            ids += common
            continue
        for index, row in enumerate(some, start):
            try:
                ids.append(_one_id(row.removesuffix(b"\n"), setting.identity, names, known.get(index)))
            except RowError as exc:
                faults.append(Fault(index, numbers[index], exc.code, exc.message))
                ids.append("")
    written = _encode_lines(ids)
    path = setting.folder / f"ids-{name}"
    path.write_bytes(written)
    return Found(
        *at,
        len(rows),
        numbers[0],
        path,
        xxhash.xxh3_128_hexdigest(written),
        names,
        faults,
        _keys(ids, numbers, {fault.row for fault in faults}, setting.partitions),
    )


def _common_ids(rows: list[bytes], identity: Identity, names: set[str]) -> list[str] | None:
    """The ids of rows that all are objects with one text for an id; None where one is not. Our names go to `names`."""
    if len(identity.names) != 1:
        return None
    (name,) = identity.names
    try:
        fields = list(map(_decode, rows))
        ids = [one[name] for one in fields]
    except _NOT_COMMON:
        return None
    if set(map(type, ids)) != {str}:
        return None
    if not _OUR_NAMES.isdisjoint(itertools.chain.from_iterable(fields)):
        names |= _OUR_NAMES & set().union(*fields)
    return ids


def _one_id(raw: bytes, identity: Identity, names: set[str], fault: tuple[str, str] | None) -> str:
    if fault is not None:
        raise RowError(*fault)
    fields = parse_object(raw)
    names |= _OUR_NAMES & fields.keys()
    return identity.of(raw, fields)


def _keys(ids: list[str], numbers: Sequence[int], faulty: set[int], partitions: int) -> list[bytes]:
    groups: list[list[int]] = [[] for _ in range(partitions)]
    for index, partition in enumerate(partitions_of(ids, partitions)):
        groups[partition].append(index)
    if faulty:
        groups = [[index for index in group if index not in faulty] for group in groups]
    first, last = numbers[0], numbers[-1]
    in_turn = last - first == len(numbers) - 1
    return [
        _encode(
            Keys(
                group,
                None if in_turn else [numbers[index] - first for index in group],
                [ids[index] for index in group],
            )
        )
        for group in groups
    ]
