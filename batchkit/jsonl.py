"""JSONL → rows: one JSON object a line, the usual task file."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batchkit.errors import InputError, RowError
from batchkit.storage import is_plain_local, open_read, shown
from batchkit.tasks import FILE_START, Place, Row, parse_object

BOM = b"\xef\xbb\xbf"

COUNTED_BYTES = 2_000_000_000
"""Files up to this size are counted before they are read: that takes a second."""


def read_rows(uri: str, start: Place = FILE_START) -> Iterator[Row]:
    """The rows of a task file from `start` on. Blank lines are not rows; a byte order mark is not part of the first."""
    with open_read(uri) as stream:
        position, number, offset = start if is_plain_local(uri) else FILE_START
        if offset:
            stream.seek(offset)
        for line in stream:
            offset += len(line)
            raw = line[:-1] if line.endswith(b"\n") else line
            if number == 1 and raw.startswith(BOM):
                raw = raw[len(BOM) :]
            if raw.strip():
                if position >= start.position:  # else: a compressed or remote file, read again from its beginning
                    yield Row(position, number, raw, offset)
                position += 1
            number += 1


def count_rows(uri: str) -> int | None:
    """About how many rows a task file has (blank lines count, too), for a progress bar.

    None where counting would take long: compressed, remote or large files.
    """
    if not is_plain_local(uri) or Path(uri).stat().st_size > COUNTED_BYTES:
        return None
    with open_read(uri) as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))


def first_row(uri: str) -> dict[str, Any] | None:
    """The first row that is a JSON object, None for a file without rows.

    Raises `InputError` where the beginning of the file shows that it is of another kind (CSV, one JSON array, binary).
    A few bad rows do not: they are rejected one by one.
    """
    first: bytes | None = None
    for row in itertools.islice(read_rows(uri), 100):
        if first is None:
            first = row.raw.strip()
            _refuse_other_kind(uri, first)
        try:
            return parse_object(row.raw)
        except RowError:
            continue
    if first is None:
        return None
    if first.startswith(b"["):
        raise InputError(f"{shown(uri)}: holds a JSON array, not one JSON object a line", hint=_jq(".[]", uri))
    raise InputError(
        f"{shown(uri)}: is not JSONL: line 1 begins with {first[:40].decode('utf-8', 'replace')!r}",
        hint="JSONL has one JSON object a line; for other formats: --input-format csv, tsv, parquet or vlmevalkit",
    )


def _refuse_other_kind(uri: str, first: bytes) -> None:
    """Refuse what would only look like many bad rows, or have a few good ones by chance."""
    if b"\x00" in first[:200] or first.startswith((b"PAR1", b"PK\x03\x04", b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):
        raise InputError(
            f"{shown(uri)}: is a binary file, not JSONL",
            hint="a compressed file is named .gz, .bz2, .xz or .zst; a Parquet file needs --input-format parquet",
        )
    if first == b"[":
        raise InputError(f"{shown(uri)}: holds a JSON array, not one JSON object a line", hint=_jq(".[]", uri))
    if first == b"{":
        raise InputError(
            f"{shown(uri)}: holds JSON spread over several lines, not one object a line", hint=_jq(".", uri)
        )


def _jq(program: str, uri: str) -> str:
    return f"jq -c '{program}' {shlex.quote(shown(uri))} > tasks.jsonl"
