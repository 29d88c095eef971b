"""Results as a table: CSV or Parquet. Rows may differ in their fields and types, so it takes two passes.

The result lines go into a temporary file first, while the columns are collected: the rows' own, then ours, each in the
order in which they first appear. Then the table is written. Memory is that of a block of rows. The members of
`batchkit` become columns of their own (`batchkit.verdict`), those of its `usage` too (`batchkit.usage.prompt_tokens`),
under the names that pandas' `json_normalize` gives them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec

from batchkit.errors import StorageError, UsageError
from batchkit.manifests import OUR_NAMES
from batchkit.storage import BUFFER_BYTES, Stream, read_lines, write_compressed, write_whole

MOST_COLUMNS = 10_000
BLOCK_ROWS = 10_000
BLOCK_BYTES = 64 << 20
"""A row group of a Parquet file ends at either."""

_INT64 = range(-(2**63), 2**63)
_SAFE = range(-(2**53), 2**53 + 1)  # whole numbers that a double holds exactly
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_any = msgspec.json.Decoder().decode


def check_parquet() -> None:
    """Raise `UsageError` where what writes Parquet is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UsageError("Parquet needs pyarrow, which is not installed", hint="pip install 'batchkit-vlm[parquet]'")


@contextlib.contextmanager
def write_table(path: Path, names: Sequence[str] = ()) -> Iterator[TableWriter]:
    """A writer of result lines; the table is at its place when the block has ended well. `names` are the columns of a
    table without rows."""
    is_parquet = path.name.endswith(".parquet")
    opened = write_whole(path) if is_parquet else write_compressed(path)
    with opened as stream, _spill(path.parent) as spill:
        writer = TableWriter(stream, spill, names, is_parquet=is_parquet)
        yield writer
        writer.flush()


@contextlib.contextmanager
def _spill(folder: Path) -> Iterator[IO[bytes]]:
    """A file without a name beside the results, gone with the process, however that ends."""
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=BUFFER_BYTES) as stream:
            yield stream
    except OSError as exc:
        raise StorageError(f"{folder}: cannot be written: {exc.strerror or exc}", hint="free some disk space") from exc


class TableWriter:
    """Takes lines; `flush` makes the table of them."""

    def __init__(self, stream: Stream, spill: IO[bytes], names: Sequence[str] = (), *, is_parquet: bool) -> None:
        self._names = names
        self._stream = stream
        self._spill = spill
        self._is_parquet = is_parquet
        self._columns = _Columns(typed=is_parquet)
        self._written = False

    def write(self, lines: bytes) -> None:
        """`lines` are results with their line feeds."""
        for line in lines.split(b"\n")[:-1]:
            self._columns.add(_decode(line))
        self._spill.write(lines)

    def flush(self) -> None:
        if self._written:
            return
        self._written = True
        self._spill.flush()
        self._spill.seek(0)
        columns = self._columns.settled() or [Column(name, "text") for name in self._names]
        rows = (_flat(_decode(line)) for line in read_lines(self._spill))  # type: ignore[arg-type]  # it is binary
        if self._is_parquet:
            _write_parquet(self._stream, columns, rows)
        else:
            _write_csv(self._stream, columns, rows)
        self._stream.flush()


class _Cell(NamedTuple):
    """A value as its JSON; `ours`: it is none of the row's own."""

    name: str
    raw: bytes
    ours: bool


def _flat(result: dict[str, msgspec.Raw]) -> dict[str, bytes]:
    return {cell.name: cell.raw for cell in _cells(result)}


def _cells(result: dict[str, msgspec.Raw]) -> Iterator[_Cell]:
    """The fields of a result; the last one, `batchkit`, in its members. A flat result has none such."""
    values = {name: bytes(value).strip() for name, value in result.items()}
    last = next(reversed(values), "")
    note = values.pop(last) if last.endswith(OUR_NAMES[-1]) and values[last][:1] == b"{" else None
    own = len(values) - (len(OUR_NAMES) - 1 if note is not None else 0)
    for place, (name, raw) in enumerate(values.items()):
        yield _Cell(name, raw, ours=place >= own)
    if note is not None:
        for name, raw in _members(last, note):
            yield _Cell(name, raw, ours=True)


def _members(name: str, raw: bytes) -> Iterator[tuple[str, bytes]]:
    for member, inner in _decode(raw).items():
        value = bytes(inner).strip()
        if member == "usage" and value[:1] == b"{":
            yield from ((f"{name}.usage.{key}", bytes(count).strip()) for key, count in _decode(value).items())
        elif member != "usage":
            yield f"{name}.{member}", value


class Column(NamedTuple):
    """`kind` is one of int, float, bool, text and json: what all of its values are."""

    name: str
    kind: str


class _Columns:
    """Collects names and kinds, ours behind the rows' own."""

    def __init__(self, *, typed: bool) -> None:
        self._typed = typed
        self._kinds: tuple[dict[str, set[str]], dict[str, set[str]]] = ({}, {})

    def add(self, result: dict[str, msgspec.Raw]) -> None:
        for name, raw, ours in _cells(result):
            kinds = self._kinds[ours].get(name)
            if kinds is None:
                kinds = self._new(name, ours=ours)
            if self._typed:
                kinds.add(_kind(raw))

    def _new(self, name: str, *, ours: bool) -> set[str]:
        if name in self._kinds[not ours]:
            raise UsageError(
                f"rows have a field {name!r}, which a column of the results is called, too",
                hint="--prefix answer_ puts that before the names of our columns",
            )
        if sum(map(len, self._kinds)) >= MOST_COLUMNS:
            raise UsageError(
                f"the rows have more than {MOST_COLUMNS:,} different fields: a table is no form for them",
                hint="-o results.jsonl",
            )
        return self._kinds[ours].setdefault(name, set())

    def settled(self) -> list[Column]:
        return [Column(name, _settle(kinds)) for group in self._kinds for name, kinds in group.items()]


def _kind(raw: bytes) -> str:
    first = raw[:1]
    if first == b'"':
        return "text"
    if first in b"tf":
        return "bool"
    if first == b"n":
        return "null"
    if first in b"{[":
        return "json"
    number = _decode_any(raw)
    if isinstance(number, float):
        return "float"
    return "small" if number in _SAFE else "int" if number in _INT64 else "json"


def _settle(kinds: set[str]) -> str:
    """The kind of a column whose values are of these: nothing but null is text, whole numbers and others are float."""
    kinds = kinds - {"null"}
    if kinds <= {"small", "int"}:
        return "int" if kinds else "text"
    if kinds <= {"small", "float"}:
        return "float"
    return kinds.pop() if len(kinds) == 1 else "json"


# -- CSV (RFC 4180) --------------------------------------------------------------------------------------------------


def _write_csv(stream: Stream, columns: list[Column], rows: Iterable[dict[str, bytes]]) -> None:
    names = [column.name for column in columns]
    stream.write(b",".join(_quoted(name.encode()) for name in names) + b"\r\n")
    for row in rows:
        stream.write(b",".join([_field(row.get(name)) for name in names]) + b"\r\n")


def _field(raw: bytes | None) -> bytes:
    """Null is an empty field, an empty text a quoted one. Numbers stay as the row writes them."""
    if raw is None or raw == b"null":
        return b""
    return _quoted(_decode_any(raw).encode() if raw[:1] == b'"' else raw)


def _quoted(text: bytes) -> bytes:
    if text and not any(mark in text for mark in (b",", b'"', b"\n", b"\r")) and text.strip() == text:
        return text
    return b'"' + text.replace(b'"', b'""') + b'"'


# -- Parquet ---------------------------------------------------------------------------------------------------------


def _write_parquet(stream: Stream, columns: list[Column], rows: Iterable[dict[str, bytes]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    types = {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_(), "text": pa.string(), "json": pa.string()}
    schema = pa.schema([(column.name, types[column.kind]) for column in columns])
    with parquet.ParquetWriter(stream, schema) as writer:
        for block in _blocks(rows):
            arrays = [
                pa.array([_value(row.get(column.name), column.kind) for row in block], types[column.kind])
                for column in columns
            ]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def _value(raw: bytes | None, kind: str) -> Any:
    if raw is None or raw == b"null":
        return None
    return raw.decode() if kind == "json" else _decode_any(raw)


def _blocks(rows: Iterable[dict[str, bytes]]) -> Iterator[list[dict[str, bytes]]]:
    block: list[dict[str, bytes]] = []
    size = 0
    for row in rows:
        block.append(row)
        size += sum(map(len, row.values()))
        if len(block) == BLOCK_ROWS or size >= BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block
