"""The files that a merge writes: results, rows to retry, lines that belong nowhere, the summary. All of them whole.

They lie beside each other: `summary.json`, `retry.jsonl`, `unexpected.jsonl` and `output_images/` beside
`results.jsonl`; beside a file of another name, `NAME.summary.json` and so on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

import msgspec

from batchkit.albums import Album
from batchkit.billing import Billing, Charges
from batchkit.depots import local_side
from batchkit.errors import StorageError, UsageError
from batchkit.pieces import Piece
from batchkit.result_tables import check_parquet, write_table
from batchkit.s3 import is_s3
from batchkit.sheets import Encoder, Sheet, Writer
from batchkit.storage import (
    COMPRESSED,
    Stream,
    is_remote,
    read_blocks,
    remove,
    remove_leftovers,
    shown,
    write_compressed,
    write_whole,
)
from batchkit.summaries import Summary, Tally

LINES = (".jsonl", ".ndjson", ".json")
TABLES = (".csv", ".parquet")


class Places(NamedTuple):
    results: Path
    summary: Path
    retry: Path
    unexpected: Path
    images: Path


def places(output: str | Path, retry_file: str | Path | None, *, never: Iterable[Path] = ()) -> Places:
    """Where the files of a merge go. Raises `UsageError` for formats we do not write, and for files in `never`:
    what the merge reads."""
    results = _target(output, (*LINES, *TABLES))
    name = _bare(results.name)
    stem = "" if name == "results" else f"{name}."
    retry = _target(retry_file, LINES) if retry_file is not None else results.with_name(f"{stem}retry.jsonl")
    chosen = Places(
        results,
        results.with_name(f"{stem}summary.json"),
        retry,
        results.with_name(f"{stem}unexpected.jsonl"),
        results.with_name(f"{stem}output_images"),
    )
    if len({path.resolve() for path in chosen}) < len(chosen):
        raise UsageError(f"{retry}: two of the files to write have this name", hint="name another --retry-file")
    for path in chosen:
        for read in never:
            same = path.resolve() == read.resolve() or read.resolve() in path.resolve().parents
            if same or f"{shown(path)}/".startswith(f"{shown(read)}/"):
                raise UsageError(f"{path}: would overwrite what the merge reads", hint="name another file with -o")
    return chosen


def place_of(uri: str | Path) -> Path:
    """Where a file is written: for one in a bucket, the local side of it."""
    return local_side(str(uri)) if is_s3(uri) else Path(str(uri).removeprefix("file://")).expanduser()


def _target(uri: str | Path, formats: tuple[str, ...]) -> Path:
    if is_remote(str(uri)) and not is_s3(uri):
        raise UsageError(f"{uri}: results go to local files, or to a bucket", hint="-o results.jsonl, or s3://…")
    path = place_of(uri)
    bare = path.name
    for ending in COMPRESSED:
        bare = bare.removesuffix(ending)
    if not bare.endswith(formats):
        raise UsageError(
            f"{path}: the name says no format that is written here: {', '.join(formats)}",
            hint="-o results.jsonl, results.csv or results.parquet; .jsonl.gz and .csv.gz are compressed",
        )
    if bare.endswith(".parquet"):
        if bare != path.name:
            raise UsageError(f"{path}: Parquet is compressed inside", hint="-o results.parquet")
        check_parquet()
    if path.is_dir() or (path.exists() and not path.is_file()):
        raise UsageError(f"{path}: is not a file", hint="-o results.jsonl")
    return path


def _compression(path: Path) -> str:
    return path.suffix if path.suffix in COMPRESSED else ""


def _bare(name: str) -> str:
    for ending in (*COMPRESSED, *LINES, *TABLES):
        name = name.removesuffix(ending)
    return name


def _move(path: Path, to: Writer) -> None:
    """Append a file of lines in whole lines, and remove it."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb", buffering=0) as stream:
        for block in read_blocks(stream):
            to.write(block)
        path.unlink()


class Outputs:
    """As a context manager: the files get their names only where the block ends well, the results last. Without `retry`
    the rows to retry are left out: they are no tasks."""

    sheet: Sheet
    """What the block writes on."""

    def __init__(self, to: Places, encoder: Encoder, billing: Billing | None = None, *, retry: bool = True) -> None:
        self._has_retry = retry
        self._retry: Stream | None = None
        self._tally = Tally()
        self._album = Album(to.images)
        self._billing = billing
        self._to = to
        self._encoder = encoder
        self._stack = contextlib.ExitStack()
        self._unexpected: IO[bytes] | None = None

    def __enter__(self) -> Self:
        for path in (self._to.results, self._to.retry):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as exc:
                raise StorageError(f"{path.parent}: cannot be made: {exc.strerror or exc}") from exc
        for path in self._to:
            remove_leftovers(path)
        is_table = self._to.results.name.removesuffix(_compression(self._to.results)).endswith(TABLES)
        made: Any = write_table if is_table else write_compressed
        columns = [self._encoder.columns] if is_table else []
        self._results = self._stack.enter_context(made(self._to.results, *columns))
        if self._has_retry:
            self._retry = self._stack.enter_context(write_compressed(self._to.retry))
        self._stack.enter_context(self._album.opened())
        self.sheet = Sheet(
            self._encoder, self._tally, self._results, retry=self._retry, strays=self._strays, album=self._album
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, value, trace)
            return
        with self._stack:
            self.sheet.flush()
            self._flush()
        if self._unexpected is None:
            remove(self._to.unexpected)  # of an earlier merge
        if self._retry is None:
            remove(self._to.retry)  # of an earlier merge, and no task file

    def _flush(self) -> None:
        """Bring all files to the disk before the first gets its name: where one does not fit, none is replaced."""
        streams = [(self._to.results, self._results)]
        if self._retry is not None:
            streams.append((self._to.retry, self._retry))
        if self._unexpected is not None:
            streams.append((self._to.unexpected, self._unexpected))
        for path, stream in streams:
            try:
                stream.flush()
            except OSError as exc:
                raise StorageError(
                    f"{path}: cannot be written: {exc.strerror or exc}", hint="free some disk space and merge again"
                ) from exc

    def take(self, piece: Piece) -> None:
        """Put the results of a shard behind those that are there, and remove their files."""
        self.sheet.flush()
        _move(piece.results, self._results)
        if self._retry is not None:
            _move(piece.retry, self._retry)
        if piece.strays.exists():
            _move(piece.strays, self._strays())
        self._tally.absorb(piece.tally)
        self._bill(piece.charges)

    def turn_to(self, *, host: str, model: str | None) -> None:
        """The responses to come are of a run of this host and model."""
        if self._billing is not None:
            self._billing.turn_to(host=host, model=model)

    def settle(self) -> None:
        """Bill the responses of what was written on the sheet."""
        self._bill(self.sheet.charges)

    def _bill(self, charges: Charges) -> None:
        if self._billing is not None:
            self._billing.take(charges)

    def _strays(self) -> IO[bytes]:
        if self._unexpected is None:
            self._unexpected = self._stack.enter_context(write_whole(self._to.unexpected))
        return self._unexpected

    def write_summary(self, **known: Any) -> Summary:
        """Write and return the summary. To be called behind the block; `known` is what `Tally.summary` takes."""
        summary = self._tally.summary(
            spent=self._billing.spent() if self._billing is not None else None,
            output=shown(self._to.results),
            retry_file=shown(self._to.retry) if self._retry is not None else None,
            unexpected_file=shown(self._to.unexpected) if self._unexpected is not None else None,
            **known,
        )
        with write_whole(self._to.summary) as stream:
            stream.write(msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n")
        return summary
