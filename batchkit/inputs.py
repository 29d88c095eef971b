"""Task file or dataset → rows, whatever its format: which format it is, and what there is to know before it is read."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchkit import hf, jsonl, parquet, remotes, s3, tables, vlmevalkit, wildcards
from batchkit.errors import InputError, RowError, UsageError
from batchkit.storage import COMPRESSED, check_rereadable, is_remote, open_read, shown, spots_checksum
from batchkit.tasks import BATCH_KEYS, DEFAULT_IMAGE_FIELD, FILE_START, InputFormat, Place, Row, parse_object

PARQUET_START = b"PAR1"
"""The first bytes of every Parquet file (parquet-format, «File format»)."""

ENDINGS: dict[str, InputFormat] = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".parquet": "parquet", ".pq": "parquet"}
NAMES = {
    "csv": "CSV",
    "tsv": "TSV",
    "parquet": "Parquet",
    "hf": "a Hugging Face dataset",
    "vlmevalkit": "VLMEvalKit's TSV",
}


@dataclass(frozen=True)
class Source:
    """Where rows come from. `uri` is absolute, `format` is decided; `images` are the fields that may hold images.

    `inferred` says that the user named no format. `first` is the first row, of JSONL its first valid one.
    """

    uri: str
    format: InputFormat
    images: tuple[str, ...]
    inferred: bool

    def rows(self, start: Place = FILE_START, *, first: int = 0) -> Iterator[Row]:
        """The rows from `start` on: the beginning, or the place behind a row. Raises `InputError`.

        Of formats that can be searched by position, those before the position `first` are left out.
        """
        if self.format in ("parquet", "hf"):
            start = start._replace(position=max(start.position, first))
        if self.format in ("csv", "tsv"):
            return tables.read_rows(self.uri, tabs=self.format == "tsv", images=self.images, start=start)
        if self.format == "vlmevalkit":
            return vlmevalkit.read_rows(self.uri, images=self.images, start=start)
        if self.format == "parquet":
            return parquet.read_rows(self.uri, self.images, start)
        if self.format == "hf":
            return hf.read_rows(self._opened, self.images, start)
        return jsonl.read_rows(self.uri, start)

    @functools.cached_property
    def first(self) -> dict[str, Any] | None:
        """The first row, None where there is none. Raises `InputError` where the file is of another kind."""
        if self.format in ("jsonl", "batch"):
            return jsonl.first_row(self.uri)
        for row in self.rows():
            try:
                return parse_object(row.raw)
            except RowError:
                return {}
        return None

    def count(self) -> int | None:
        """About how many rows there are, for a progress bar; None where counting would take long."""
        if self.format == "parquet":
            return parquet.count_rows(self.uri)
        return self._opened.rows if self.format == "hf" else jsonl.count_rows(self.uri)

    @property
    def folder(self) -> Path:
        """Where relative paths of images start: beside the file, or beside the folder of a dataset."""
        if self.uri.startswith(hf.SCHEME):
            return Path.cwd()
        return hf.split_uri(self.uri)[0].parent if self.format == "hf" else Path(self.uri).parent

    @property
    def size(self) -> int:
        """Bytes."""
        if self.format == "hf":
            return self._opened.bytes
        return self._version.bytes if is_remote(self.uri) else Path(self.uri).stat().st_size

    @property
    def modified(self) -> int | None:
        """When the file was written last, in ns; None for a dataset."""
        if self.format == "hf":
            return None
        return self._version.modified if is_remote(self.uri) else Path(self.uri).stat().st_mtime_ns

    @property
    def fingerprint(self) -> str | None:
        """Tells inputs of one size apart, wherever they are; None where nothing does."""
        if self.format != "hf" and is_remote(self.uri):
            return self._version.etag
        return self._opened.fingerprint if self.format == "hf" else spots_checksum(self.uri)

    def notes(self) -> list[str]:
        """What the user should know of how the input is read."""
        notes = []
        if self.inferred and self.format in NAMES:
            notes.append(f"{Path(shown(self.uri)).name} is read as {NAMES[self.format]}; --input-format says otherwise")
        left_out: list[str] = []
        if self.format == "parquet":
            left_out = parquet.columns_left_out(self.uri, self.images)
        elif self.format == "hf":
            left_out = self._opened.columns(self.images).left_out
        if self.format not in ("jsonl", "batch") and (row := next(self.rows(), None)) is not None:
            left_out += [name for name in row.attached or () if name not in (*self.images, *left_out)]
        if left_out:
            names = ", ".join(map(repr, left_out))
            notes.append(
                f"columns of bytes are left out: {names}; as images they are sent with --image-field NAME, "
                "or where a placeholder names them"
            )
        return notes

    @functools.cached_property
    def _version(self) -> remotes.Version:
        return remotes.look(self.uri)

    @functools.cached_property
    def _opened(self) -> hf.Opened:
        return hf.open_dataset(self.uri)


def open_source(tasks: str | Path, wanted: InputFormat = "auto", images: tuple[str, ...] | None = None) -> Source:
    """Decide on the format of `tasks`; `wanted` is the user's word on it, `images` the named image fields.

    Raises `InputError` where there is nothing that can be read.
    """
    uri = str(tasks)
    try:
        uri.encode()
    except UnicodeEncodeError as exc:
        raise InputError(
            f"{uri.encode('utf-8', 'backslashreplace').decode()}: the file's name is not UTF-8", hint="rename it"
        ) from exc
    if not uri.startswith(hf.SCHEME):
        _refuse_pattern(uri)
        if is_remote(uri):
            remotes.look(uri)  # for its errors, which say more than those of opening it
        else:
            uri = str(Path(uri).expanduser().absolute())
            check_rereadable(uri)
    elif wanted not in ("auto", "hf"):
        raise UsageError(f"{uri} is a Hugging Face dataset, not {wanted}", hint="leave --input-format out")
    if wanted in ("csv", "tsv", "vlmevalkit"):
        _refuse_no_table(uri, wanted)
    source = Source(
        uri=uri,
        format=_guess(uri) if wanted == "auto" else wanted,
        images=(DEFAULT_IMAGE_FIELD,) if images is None else images,
        inferred=wanted == "auto",
    )
    if source.inferred and source.format == "jsonl" and (source.first or {}).keys() >= BATCH_KEYS:
        return Source(uri, "batch", source.images, inferred=True)
    return source


def _refuse_pattern(uri: str) -> None:
    """Raise `InputError` for a name with wildcards, unless it is that of a file."""
    if uri.startswith(("http://", "https://")) or not wildcards.is_pattern(uri):
        return
    there = s3.version(uri) is not None if s3.is_s3(uri) else Path(uri.removeprefix("file://")).expanduser().exists()
    if not there:
        raise InputError(
            f"{uri}: a run has one task file: wildcards stand for none here",
            hint="put the files together first (cat part-*.jsonl > tasks.jsonl), or prepare a run of each",
        )


def _refuse_no_table(uri: str, wanted: InputFormat) -> None:
    """Raise `InputError` where a file that is to be read as a table is seen at once to be another."""
    if Path(uri).is_dir():
        return
    with open_read(uri) as stream:
        start = stream.read(4096)
    if start.startswith(PARQUET_START):
        raise InputError(f"{shown(uri)}: is a Parquet file, not {NAMES[wanted]}", hint="--input-format parquet")
    if _is_json_line(start.removeprefix(jsonl.BOM)):
        raise InputError(
            f"{shown(uri)}: has a JSON object in its first line, not a header", hint="--input-format jsonl"
        )


def _guess(uri: str) -> InputFormat:
    """The format by the name, and by the first bytes where these leave no doubt."""
    if hf.is_dataset(uri):
        return "hf"
    if not is_remote(uri) and Path(uri).is_dir():
        raise InputError(f"{uri}: is a directory, not a file", hint="a dataset's folder is made by save_to_disk")
    with open_read(uri) as stream:
        start = stream.read(4096)
    if start.startswith(PARQUET_START):
        return "parquet"
    name = shown(uri)
    while name.endswith(COMPRESSED):
        name = name.rpartition(".")[0]
    by_name = ENDINGS.get(Path(name).suffix.lower(), "jsonl")
    if by_name in ("csv", "tsv") and _is_json_line(start.removeprefix(jsonl.BOM)):
        return "jsonl"
    if by_name == "tsv" and vlmevalkit.is_vlmevalkit(tables.read_header(uri, tabs=True)):
        return "vlmevalkit"
    return by_name


def _is_json_line(start: bytes) -> bool:
    """Whether a file that begins with `start` has a JSON object in its first line, or all of the beginning of one."""
    if not start.startswith((b'{"', b"{ ")):
        return False
    line, whole, _ = start.partition(b"\n")
    try:
        parse_object(line)
    except RowError:
        return not whole and len(start) == 4096
    return True
