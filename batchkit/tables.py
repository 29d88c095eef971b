"""CSV and TSV → rows. Every value is a text; a spoilt row is one with a fault, never a shift of others.

The rules are RFC 4180's, as Python's csv reads them: fields with quotes may hold line breaks, a quote in them is
doubled. Lines end at a line feed alone (with or without a carriage return before it). Where a row of several lines
breaks these rules, its first line alone is rejected and the next is read as a row: a quote may have swallowed others.
"""

from __future__ import annotations

import csv
import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import msgspec

from batchkit.errors import InputError
from batchkit.inline_images import detach
from batchkit.jsonl import BOM
from batchkit.storage import is_plain_local, open_read, shown
from batchkit.tasks import FILE_START, Place, Row

FIELD_LIMIT = 1 << 28
"""Characters of a field: more are a quote that is not closed rather than an image."""

LINES_KEPT = 10_000
CHARACTERS_KEPT = 1 << 26
"""How far behind its first line a row is read again where it turns out to break the rules. More are an error."""

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
    cells: dict[str, Any]
    fault: tuple[str, str] | None


def read_rows(uri: str, *, tabs: bool, images: tuple[str, ...], start: Place = FILE_START) -> Iterator[Row]:
    """The rows of a table from `start` on, as JSON objects; images in their cells are attached to them.

    Raises `InputError` for a header that names nothing or one thing twice, and for a quote that swallows rows.
    """
    for cells in read_cells(uri, read_header(uri, tabs=tabs), start):
        attached = detach(cells.cells, images)
        yield Row(cells.position, cells.line, _encode(cells.cells), cells.end, attached or None, cells.fault)


def read_header(uri: str, *, tabs: bool) -> Header:
    """Raises `InputError` where the file begins with no usable header."""
    csv.field_size_limit(max(FIELD_LIMIT, csv.field_size_limit()))
    with open_read(uri) as stream:
        lines = _Lines(stream, FILE_START)
        first = next(lines, "")
        delimiter = "\t" if tabs else "," if "," in first or ";" not in first else ";"
        try:
            names = next(csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True), [])
        except csv.Error as exc:
            hint = (
                f"tr '\\r' '\\n' < {shown(uri)} > mended.csv"
                if first.count("\r") > 1
                else "check the file's first line"
            )
            raise InputError(f"{shown(uri)}:1: the header cannot be read: {_broken_rule(exc)}", hint=hint) from exc
    if not first:
        raise InputError(f"{shown(uri)}: has no rows", hint="check the path: the file is empty")
    if lines.broken or "\x00" in first:
        raise InputError(
            f"{shown(uri)}: its first line is not UTF-8 text",
            hint=f"iconv -f utf-16 -t utf-8 {shown(uri)} > mended.csv",
        )
    if not any(name.strip() for name in names):
        raise InputError(
            f"{shown(uri)}: its first line names no column", hint="the first line of a table is its header"
        )
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise InputError(f"{shown(uri)}: two columns are named {twice[0]!r}", hint="rename one of them")
    if not tabs and len(names) == 1 and "\t" in first:
        raise InputError(f"{shown(uri)}: its columns are separated by tabs", hint="--input-format tsv")
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
        reader = csv.reader(lines, delimiter=header.delimiter, strict=True)
        while (cells := _next(uri, reader, lines, header)) is not None:
            if cells.cells or cells.fault:
                if position >= start.position:
                    yield cells._replace(position=position)
                position += 1


def _next(uri: str, reader: Iterator[list[str]], lines: _Lines, header: Header) -> Cells | None:
    """The next row; None behind the last. One without cells and fault is a blank line."""
    line, offset, names = lines.line, lines.offset, header.names
    lines.begin()
    fault = None
    try:
        cells = next(reader, None)
    except csv.Error as exc:
        cells, fault = _first_line(uri, line, lines, header, exc)
    if cells is None:
        return None
    if not cells:
        return Cells(0, line, offset, lines.offset, {}, None)
    if len(cells) != len(names):
        spans = f" (it spans {lines.line - line:,} lines)" if lines.line > line + 1 else ""
        fault = fault or ("cells", f"the row has {len(cells):,} cells, the header {len(names):,}{spans}")
    if lines.broken:
        cells = [cell.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for cell in cells]
        fault = fault or ("utf-8", "the row is not valid UTF-8")
    if any("\x00" in cell for cell in cells):
        fault = fault or ("nul", "the row has a NUL character")
    return Cells(0, line, offset, lines.offset, _named(names, cells), fault)


def _first_line(
    uri: str, line: int, lines: _Lines, header: Header, exc: csv.Error
) -> tuple[list[str], tuple[str, str]]:
    """What can be read of the first line of a row that breaks the rules, and why it is rejected; `lines` goes on
    behind that line. Raises `InputError` where that is too far back."""
    if "field limit" in str(exc):
        raise InputError(
            f"{shown(uri)}:{line}: a field has more than {FIELD_LIMIT:,} characters",
            hint="is a quote not closed there?",
        ) from exc
    why = _broken_rule(exc)
    if lines.line > line + 1:
        why = "a quote is opened in this row and not closed properly"
        if not lines.go_back():
            raise InputError(
                f"{shown(uri)}:{line}: {why}: {lines.line - line:,} lines were read in search of its end",
                hint="close it, or double it if it is a part of the text",
            ) from exc
    try:
        return next(csv.reader([lines.text], delimiter=header.delimiter), []), ("cells", why)
    except csv.Error:
        return [lines.text.rstrip("\r\n")], ("cells", why)


def _broken_rule(exc: csv.Error) -> str:
    """Which rule a row breaks: what Python's csv says is about how it is called."""
    if "new-line" in str(exc):
        return "a carriage return stands alone, outside of quotes"
    if "end of data" in str(exc):
        return "a quote is not closed: the row is cut off"
    return "text follows a closing quote: a quote that is part of a text is doubled"


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

    `broken` says that a line since `begin` was not UTF-8 (its bytes are in the text as surrogates).
    """

    def __init__(self, stream: BinaryIO, place: Place) -> None:
        self._stream = stream
        self.line = place.line
        self.offset = place.offset
        self.text = ""
        self.broken = False
        self._ahead: deque[bytes] = deque()
        self._since: list[bytes] | None = []
        self._size = 0

    def __iter__(self) -> _Lines:
        return self

    def begin(self) -> None:
        """A row begins with the next line."""
        self.broken = False
        self._since, self._size = [], 0

    def go_back(self) -> bool:
        """Go back to behind the first line since `begin`, and say whether that was possible."""
        if not self._since:
            return False
        first, *others = self._since
        self._ahead.extendleft(reversed(others))
        self.offset -= sum(map(len, others))
        self.line -= len(others)
        self.begin()
        self._take(first)
        return True

    def __next__(self) -> str:
        raw = self._ahead.popleft() if self._ahead else self._stream.readline()
        if not raw:
            raise StopIteration
        if self.offset == 0:
            self.offset, raw = (len(BOM), raw[len(BOM) :]) if raw.startswith(BOM) else (0, raw)
        self.offset += len(raw)
        self.line += 1
        if self._since is not None:
            self._size += len(raw) if self._since else 0
            self._since.append(raw)
            if len(self._since) > LINES_KEPT or self._size > CHARACTERS_KEPT:
                self._since = None
        return self._take(raw)

    def _take(self, raw: bytes) -> str:
        try:
            self.text = raw.decode()
        except UnicodeDecodeError:
            self.broken = True
            self.text = raw.decode("utf-8", "surrogateescape")
        return self.text
