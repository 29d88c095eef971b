"""The stage `merge`: rows and responses of a run → one result per row, in row order.

Shard after shard, in the memory of one: the responses to shard k belong to rows k. So several processes can each make
the results of a shard, as files aside, which are put together in the order of the rows. It works at any time, also
while `submit` is running; what has no response yet is `pending`. Several runs, parts of one task file, give one result.
"""

from __future__ import annotations

import contextlib
import glob
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from batchkit import elsewhere
from batchkit.assembly import assemble, folder_aside, team_of, workers_for
from batchkit.billing import Billing
from batchkit.errors import UsageError
from batchkit.flat import check_flat, fields_of
from batchkit.jobs import Attempt
from batchkit.manifests import Seal
from batchkit.outcomes import files_of
from batchkit.outputs import Outputs, Places, place_of, places
from batchkit.parts import Parts, Span, open_all
from batchkit.pieces import Encoding, Form, Order
from batchkit.progress import Progress, Silent
from batchkit.runs import Run
from batchkit.s3 import is_s3
from batchkit.storage import is_remote
from batchkit.summaries import Summary

__all__ = ["Summary", "merge"]


def merge(
    run: str | Path | Run | Sequence[str | Path | Run],
    *,
    output: str | Path | None = None,
    parse: str | None = None,
    prefix: str = "",
    flat: bool = False,
    retry_file: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Write one result per row of `run`, and the summary and the rows to retry beside them.

    `run` may be several runs: parts of one task file, in any order. Their results are one, in the order of the rows.
    Rows whose images or prompts are not in them (of tables with images inside, of VLMEvalKit) make no file to retry.
    `output` is `RUN/results.jsonl` unless given, and may be a `.csv` or `.parquet`; `parse` is one of `answers.KINDS`,
    unless given `text`, or `json` checked against the schema where a run was prepared with one; `prefix` goes before
    the names of the fields that a result adds; `flat` writes `flat.COLUMNS` alone. `workers` is the number of
    processes, None for one a core where there is work for them; what is written is the same. Nothing is replaced unless
    all of it was written. Raises `UsageError` where a row uses one of our names, or runs do not go together; `RunError`
    where a run is damaged, `RunBusyError` where another merge is at work.
    """
    runs = open_all(run)
    progress = progress or Silent()
    if output is None and len(runs) > 1:
        raise UsageError("results of several runs need a name", hint="-o results.jsonl")
    parts = Parts(runs)
    if flat:
        check_flat(prefix)
    encoding = Encoding(parse=parse or "text", prefix=prefix, flat=flat)
    to = places(output or runs[0].path / "results.jsonl", retry_file, never=[*_read_by_merge(runs)])
    has_retry = all(span.rows_are_tasks for span in parts.spans)
    if retry_file is not None and not has_retry:
        raise UsageError(
            f"--retry-file {retry_file}: rows of this run are no tasks by themselves, without their images and prompts",
            hint=f"{send_rest(runs)} sends only the rows without an answer",
        )
    prepared = [run.prepared() for run in runs]
    for totals in prepared:
        if totals is not None:
            if not flat:
                check_names(totals.names_in_use, prefix)
            progress.grow(totals.rows)
    with contextlib.ExitStack() as leases:
        for one in runs:
            leases.enter_context(one.lease("merge"))
            _remove_leftovers(one, to)
            if gathered := str(elsewhere.gather(one, {seal.shard: seal for seal in one.seals()})):
                progress.say(gathered)
        with Outputs(to, encoding.encoder, Billing(host="openai", model=None), retry=has_retry) as outputs:
            count = _workers(workers, parts.spans)
            aside = folder_aside(to.results) if count > 1 else contextlib.nullcontext(to.results.parent)
            with aside as folder, team_of(count) as team:
                orders = _Orders(parts.spans, parse, prefix, folder, flat=flat, retry=has_retry)
                assemble(orders, outputs, encoding, progress=progress, team=team)
        return outputs.write_summary(
            **parts.known(),
            attempts=orders.attempts,
            prepared=None not in prepared,
            send_rest=None if has_retry else send_rest(runs),
        )


class _Orders:
    """The shards to merge, in the order of their rows; `attempts` are those of the shards so far."""

    def __init__(
        self, spans: Sequence[Span], parse: str | None, prefix: str, folder: Path, *, flat: bool, retry: bool
    ) -> None:
        self.attempts: list[Attempt] = []
        self._count = 0
        self._spans = spans
        self._parse = parse
        self._prefix = prefix
        self._flat = flat
        self._retry = retry
        self._folder = folder

    def __iter__(self) -> Iterator[Order]:
        for span in self._spans:
            manifest = span.run.manifest
            schema, fields = manifest.response_schema, fields_of(manifest.options) if self._flat else None
            parse = self._parse or ("json" if schema is not None else "text")
            host = str(manifest.options.get("host", "openai"))
            form = Form(manifest.model, parse, schema, self._prefix, fields, host)
            for seal in span.seals():
                files = files_of(span.run, seal)
                self.attempts += files.attempts
                requests = _requests(span.run, seal) if self._flat else None
                self._count += 1
                yield Order(files, requests, form, self._retry, self._folder / str(self._count))


def _workers(asked: int | None, spans: Sequence[Span]) -> int:
    shards = sum(span.last.shard + 1 for span in spans if span.last is not None)
    return workers_for(asked, shards, rows=sum(span.end - span.start for span in spans))


def _requests(run: Run, seal: Seal) -> Path | None:
    """The requests of a shard, where they are ours and still there."""
    path = run.requests_path(seal.shard)
    if run.manifest.options.get("input_format") == "batch" or run.bytes_of(path) is None:
        return None
    return run.fetch(path)


def send_rest(runs: Sequence[Run]) -> str:
    """The command that asks again what has no answer."""
    return "batchkit prepare TASKS NEW_RUN … " + " ".join(f"--reuse {shlex.quote(run.name)}" for run in runs)


def _remove_leftovers(run: Run, to: Places) -> None:
    """Remove what a killed merge wrote aside in the run, where the lease says that nobody writes now."""
    for path in to:
        if path.parent == run.path:
            for aside in run.path.glob(f".{glob.escape(path.name)}.*.tmp"):
                if aside.is_dir():  # images
                    shutil.rmtree(aside, ignore_errors=True)
                else:
                    aside.unlink(missing_ok=True)


def check_names(names_in_use: list[str], prefix: str) -> None:
    """Raise `UsageError` where rows have fields already that results would overwrite."""
    if names_in_use and not prefix:
        raise UsageError(
            f"rows have fields {', '.join(map(repr, names_in_use))} already, which results would overwrite",
            hint="--prefix answer_ puts that before the names of our fields",
        )


def _read_by_merge(runs: Sequence[Run]) -> Iterator[Path]:
    for run in runs:
        for name in (
            "rows",
            "requests",
            "jobs",
            "responses",
            "presigned",
            "engine",
            "leases",
            "manifest.json",
            "prepared.json",
        ):
            yield run.path / name
        uri = run.manifest.input.uri
        if not is_remote(uri) or is_s3(uri):
            yield place_of(uri)
