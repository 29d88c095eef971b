"""VLMEvalKit's TSV files → rows, and the question that VLMEvalKit asks of a row.

The rules are those of vlmeval/dataset/image_base.py and image_mcq.py (open-compass/VLMEvalKit 0.2): `image` is base64,
a list of base64, or the index of another row that has the image; else `image_path` names files. What pandas takes for a
missing value is missing.
"""

from __future__ import annotations

import sqlite3
import string
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from batchkit.errors import InputError
from batchkit.inline_images import SHORTEST, Images, as_source, detach, images_in, is_inline, split_list
from batchkit.storage import is_plain_local, shown
from batchkit.tables import Header, read_cells, read_header
from batchkit.tasks import FILE_START, Place, Row

INDEX, IMAGE, PATH, QUESTION, HINT = "index", "image", "image_path", "question", "hint"
ID_FIELDS = (INDEX,)

MISSING = frozenset({
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
})  # fmt: skip
"""The texts that `pandas.read_csv` (2.3) reads as missing, and VLMEvalKit with it."""

_encode = msgspec.json.Encoder().encode


def is_vlmevalkit(header: Header) -> bool:
    """Whether a table has the columns that make a file of VLMEvalKit."""
    return {INDEX, QUESTION} <= set(header.names) and (IMAGE in header.names or PATH in header.names)


def question_of(fields: Mapping[str, Any], question: str) -> str:
    """What VLMEvalKit asks of a row: of a file that has options (columns A, B, …) hint, question and options, else the
    question alone."""
    letters = [letter for letter in string.ascii_uppercase if letter in fields]
    if not letters:
        return question
    lines = [] if fields.get(HINT, "") in MISSING else [f"Hint: {fields[HINT]}\n"]
    lines.append(f"Question: {question}\n")
    options = [f"{letter}. {fields[letter]}\n" for letter in letters if fields[letter] not in MISSING]
    if options:
        lines += ["Options:\n", *options, "Please select the correct answer from the options above. \n"]
    return "".join(lines)


def read_rows(uri: str, *, images: tuple[str, ...], start: Place = FILE_START) -> Iterator[Row]:
    """The rows from `start` on, with the images of the field `image` attached to them, or of those that are named.

    Raises `InputError` as `tables.read_rows` does, and where columns are missing.
    """
    header = read_header(uri, tabs=True)
    if not is_vlmevalkit(header):
        raise InputError(
            f"{shown(uri)}: has not the columns of VLMEvalKit (index, question, and image or image_path)",
            hint="--input-format tsv reads any table",
        )
    others = _Others(uri, header)
    for cells in read_cells(uri, header, start):
        fields, fault = cells.cells, cells.fault
        attached: dict[str, Images] = {}
        for name in images:
            found = _own_images(fields.get(name, ""))
            if found is None and name == IMAGE:
                found = _elsewhere(fields, others)
            if found is not None:
                attached[name] = found
                if len(fields.get(name, "")) > SHORTEST and any(str(one).startswith("data:") for one in found):
                    del fields[name]
            elif name == IMAGE and fields.get(IMAGE, "").isdecimal():
                fault = fault or ("image", f"no row with an image of its own has the index {fields[IMAGE]!r}")
        attached = detach(fields, ()) | attached
        yield Row(cells.position, cells.line, _encode(fields), cells.end, attached or None, fault)


def _elsewhere(fields: Mapping[str, str], others: _Others) -> Images | None:
    """The images of a row whose field `image` has none itself: those of another row, or of `image_path`."""
    reference = fields.get(IMAGE, "")
    if reference not in MISSING:
        return others.images_of(reference)
    path = fields.get(PATH, "")
    return () if path in MISSING else tuple(split_list(path) or [path])


def _own_images(cell: str) -> Images | None:
    """The images that a cell itself holds; None where it is missing, a path, or the index of another row."""
    if len(cell) <= SHORTEST:
        return images_in(cell) if is_inline(cell) or split_list(cell) is not None else None
    listed = split_list(cell)
    if listed is not None:
        return tuple(as_source(one) if _is_base64(one) else one for one in listed)
    return (as_source(cell),) if _is_base64(cell) else None


def _is_base64(text: str) -> bool:
    """VLMEvalKit takes any long text for base64; a path has an ending, and base64 has no dots."""
    return len(text) > SHORTEST and "." not in text[-8:]


class _Others:
    """The images that rows of a file have themselves, found by their index when another row first asks for one.

    Only where the rows are is kept, on the disk, so that the memory grows neither with the rows nor with the images.
    """

    def __init__(self, uri: str, header: Header) -> None:
        self._uri = uri
        self._header = header
        self._places: sqlite3.Connection | None = None

    def images_of(self, index: str) -> Images | None:
        """The images of the row `index`; None where there is none, or it has only a reference itself."""
        if self._places is None:
            self._places = self._find()
        found = self._places.execute("SELECT line, start FROM places WHERE row = ?", (index,)).fetchone()
        if found is None:
            return None
        if not is_plain_local(self._uri):
            raise InputError(
                f"{shown(self._uri)}: rows refer to the images of other rows, which a compressed file cannot be "
                "searched for",
                hint="decompress it first",
            )
        line, start = found
        return _own_images(next(read_cells(self._uri, self._header, Place(0, line, start))).cells[IMAGE])

    def _find(self) -> sqlite3.Connection:
        # A temporary file of SQLite's own, gone with the process; what a crash leaves of it is worthless.
        places = sqlite3.connect("", isolation_level=None)
        places.execute("PRAGMA journal_mode = OFF")
        places.execute("CREATE TABLE places (row TEXT PRIMARY KEY, line INTEGER, start INTEGER) WITHOUT ROWID")
        places.execute("BEGIN")
        places.executemany(
            "INSERT OR REPLACE INTO places VALUES (?, ?, ?)",  # the last of two rows with one index, as in VLMEvalKit
            (
                (cells.cells.get(INDEX, ""), cells.line, cells.start)
                for cells in read_cells(self._uri, self._header)
                if len(cells.cells.get(IMAGE, "")) > SHORTEST
            ),
        )
        places.execute("COMMIT")
        return places
