"""CSV and TSV → rows. Every value is a text; a spoilt row is one with a fault, never a shift of others.

The rules are RFC 4180's, as Python's csv reads them: fields with quotes may hold line breaks, a quote in them is
doubled. Lines end at a line feed alone (with or without a carriage return before it).
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import msgspec

from batchkit.errors import InputError
from batchkit.inline_images import detach
from batchkit.jsonl import BOM
from batchkit.storage import is_plain_local, open_read
from batchkit.tasks import FILE_START, Place, Row

FIELD_LIMIT = 1 << 28
"""Characters of a field: more are a quote that is not closed rather than an image."""

EXTRA = "extra cells"
"""Where the row keeps what its header has no name for."""

_encode = msgspec.json.Encoder().encode


class Header(NamedTuple):
    """The first line of a table. `place` is what comes behind it."""

    names: tuple[str, ...]
    delimiter: str
    place: Place


class Cells(NamedTuple):
    """One row of a table, as `Row` has it; `start` is the offset of its first byte."""

    position: int
    line: int
    start: int
    end: int
    cells: dict[str, str]
    fault: tuple[str, str] | None


def read_rows(uri: str, *, tabs: bool, images: tuple[str, ...], start: Place = FILE_START) -> Iterator[Row]:
    """The rows of a table from `start` on, as JSON objects; what is inline in the fields `images` is attached to them.

    Raises `InputError` for a header that names nothing or one thing twice, and for a quote that swallows rows.
    """
    for cells in read_cells(uri, read_header(uri, tabs=tabs), start):
        attached = detach(cells.cells, images)
        yield Row(cells.position, cells.line, _encode(cells.cells), cells.end, attached, cells.fault)


def read_header(uri: str, *, tabs: bool) -> Header:
    """Raises `InputError` where the file begins with no usable header."""
    csv.field_size_limit(max(FIELD_LIMIT, csv.field_size_limit()))
    with open_read(uri) as stream:
        lines = _Lines(stream, FILE_START)
        first = next(lines, "")
        delimiter = "\t" if tabs else "," if "," in first or ";" not in first else ";"
        try:
            names = next(csv.reader(itertools.chain([first], lines), delimiter=delimiter), [])
        except csv.Error as exc:
            hint = f"tr '\\r' '\\n' < {uri} > mended.csv" if first.count("\r") > 1 else "check the file's first line"
            raise InputError(f"{uri}:1: the header cannot be read: {exc}", hint=hint) from exc
    if not first:
        raise InputError(f"{uri}: has no rows", hint="check the path: the file is empty")
    if lines.broken or "\x00" in first:
        raise InputError(
            f"{uri}: its first line is not UTF-8 text", hint=f"iconv -f utf-16 -t utf-8 {uri} > mended.csv"
        )
    if not any(name.strip() for name in names):
        raise InputError(f"{uri}: its first line names no column", hint="the first line of a table is its header")
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise InputError(f"{uri}: two columns are named {twice[0]!r}", hint="rename one of them")
    if not tabs and len(names) == 1 and "\t" in first:
        raise InputError(f"{uri}: its columns are separated by tabs", hint="--input-format tsv")
    return Header(tuple(names), delimiter, Place(0, lines.line, lines.offset))


def read_cells(uri: str, header: Header, start: Place = FILE_START) -> Iterator[Cells]:
    """The rows of a table from `start` on: the place behind any of its rows, or its beginning."""
    with open_read(uri) as stream:
        place = start if is_plain_local(uri) and start.offset else header.place
        if is_plain_local(uri):
            stream.seek(place.offset)
        else:
            stream.read(place.offset)
        lines, position = _Lines(stream, place), place.position
        reader = csv.reader(lines, delimiter=header.delimiter)
        while (cells := _next(uri, reader, lines, header.names)) is not None:
            if cells.cells or cells.fault:
                if position >= start.position:
                    yield cells._replace(position=position)
                position += 1


def _next(uri: str, reader: Iterator[list[str]], lines: _Lines, names: tuple[str, ...]) -> Cells | None:
    """The next row; None behind the last. One without cells and fault is a blank line."""
    line, offset = lines.line, lines.offset
    lines.broken = False
    fault = None
    try:
        cells = next(reader, None)
    except csv.Error as exc:
        if "field limit" in str(exc):
            raise InputError(
                f"{uri}:{line}: a field has more than {FIELD_LIMIT:,} characters", hint="is a quote not closed there?"
            ) from exc
        # What Python's csv says then is about how it is called; the one cause is a lone carriage return.
        cells, fault = [lines.text.rstrip("\r\n")], ("cells", "a carriage return stands alone, outside of quotes")
    if cells is None:
        return None
    if lines.ended:
        if lines.line > line + 1:
            raise InputError(
                f"{uri}:{line}: a quote is opened in this row and not closed up to the end of the file",
                hint="close it, or double it if it is a part of the text",
            )
        fault = fault or ("cells", "a quote is not closed: the row is cut off")
    if not cells:
        return Cells(0, line, offset, lines.offset, {}, None)
    if len(cells) != len(names):
        fault = fault or ("cells", f"the row has {len(cells):,} cells, the header {len(names):,}")
    if lines.broken:
        cells = [cell.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for cell in cells]
        fault = fault or ("utf-8", "the row is not valid UTF-8")
    if any("\x00" in cell for cell in cells):
        fault = fault or ("nul", "the row has a NUL character")
    return Cells(0, line, offset, lines.offset, _named(names, cells), fault)


def _named(names: tuple[str, ...], cells: list[str]) -> dict[str, str]:
    """The cells under their names; those that have none as one text, separated by tabs."""
    named = dict(zip(names, cells, strict=False))
    if len(cells) > len(names):
        extra = EXTRA
        while extra in named:
            extra += "_"
        named[extra] = "\t".join(cells[len(names) :])
    return named


class _Lines:
    """The lines of a file as text, and how far they are read: `line` (from 1) and `offset` are of what comes next.

    `broken` says that a line was not UTF-8 (its bytes are in the text as surrogates), `ended` that one was asked for
    behind the last.
    """

    def __init__(self, stream: BinaryIO, place: Place) -> None:
        self._stream = stream
        self.line = place.line
        self.offset = place.offset
        self.text = ""
        self.broken = False
        self.ended = False

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        raw = self._stream.readline()
        if not raw:
            self.ended = True
            raise StopIteration
        if self.offset == 0:
            self.offset, raw = (len(BOM), raw[len(BOM) :]) if raw.startswith(BOM) else (0, raw)
        self.offset += len(raw)
        self.line += 1
        try:
            self.text = raw.decode()
        except UnicodeDecodeError:
            self.broken = True
            self.text = raw.decode("utf-8", "surrogateescape")
        return self.text
