"""The stage `merge`: rows and responses of a run → one result per row, in row order.

Shard after shard, in the memory of one: the responses to shard k belong to rows k. It works at any time, also while
`submit` is running; what has no response yet is `pending`.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path

import xxhash

from batchkit.billing import Billing
from batchkit.errors import InputError, UsageError
from batchkit.jobs import Attempt
from batchkit.outcomes import damaged, load
from batchkit.outputs import Outputs, Places, place_of, places
from batchkit.progress import Progress, Silent
from batchkit.results import ResultEncoder
from batchkit.runs import Run, Seal
from batchkit.s3 import is_s3
from batchkit.storage import is_remote, open_read
from batchkit.summaries import Summary

__all__ = ["Summary", "merge"]


def merge(
    run: str | Path | Run,
    *,
    output: str | Path | None = None,
    parse: str = "text",
    prefix: str = "",
    retry_file: str | Path | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Write one result per row of `run`, and the summary and the rows to retry beside them.

    `output` is `RUN/results.jsonl` unless given; `parse` is one of `answers.KINDS`; `prefix` goes before the names of
    the fields that a result adds. Nothing is replaced unless all of it was written. Raises `UsageError` where a row
    uses one of our names, `RunError` where the run is damaged, `RunBusyError` where another merge is at work.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    progress = progress or Silent()
    encoder = ResultEncoder(parse=parse, prefix=prefix, model=run.manifest.model)
    to = places(output or run.path / "results.jsonl", retry_file, never=_read_by_merge(run))
    prepared = run.prepared()
    if prepared is not None:
        check_names(prepared.names_in_use, prefix)
        progress.grow(prepared.rows)
    attempts: list[Attempt] = []
    with run.lease("merge"):
        _remove_leftovers(run, to)
        billing = Billing(host=str(run.manifest.options.get("host", "openai")), model=run.manifest.model)
        with Outputs(to, encoder, billing) as outputs:
            for seal in run.seals():
                _merge_shard(run, seal, outputs, billing)
                attempts += run.job(seal.shard).attempts
                progress.update(seal.end - seal.start)
        return outputs.write_summary(model=run.manifest.model, attempts=attempts, prepared=prepared is not None)


def _remove_leftovers(run: Run, to: Places) -> None:
    """Remove what a killed merge wrote aside in the run, where the lease says that nobody writes now."""
    for path in to:
        if path.parent == run.path:
            for aside in run.path.glob(f".{glob.escape(path.name)}.*.tmp"):
                aside.unlink(missing_ok=True)


def _merge_shard(run: Run, seal: Seal, outputs: Outputs, billing: Billing) -> None:
    shard = load(run, seal)
    for outcome, row in zip(shard.outcomes, _rows(run, seal), strict=True):
        outputs.add(row, outcome)
    outputs.add_strays(shard.unexpected, shard.unreadable)
    for backend, response in shard.superseded:
        billing.add(response, backend)


def _rows(run: Run, seal: Seal) -> Iterator[bytes]:
    """The shard's rows. Raises `RunError`, behind the last one at the latest, where they are not what prepare wrote."""
    path = run.fetch(run.rows_path(seal.shard))
    digest = xxhash.xxh3_128()
    try:
        with open_read(str(path)) as stream:
            for count, line in enumerate(stream):
                if count == seal.end - seal.start:
                    raise damaged(path, "has more rows than prepare wrote")
                digest.update(line)
                yield line.removesuffix(b"\n")
    except InputError as exc:
        raise damaged(path, "cannot be read") from exc
    if digest.hexdigest() != seal.rows_checksum:
        raise damaged(path, "is not what prepare wrote (its checksum differs)")


def check_names(names_in_use: list[str], prefix: str) -> None:
    """Raise `UsageError` where rows have fields already that results would overwrite."""
    if names_in_use and not prefix:
        raise UsageError(
            f"rows have fields {', '.join(map(repr, names_in_use))} already, which results would overwrite",
            hint="--prefix answer_ puts that before the names of our fields",
        )


def _read_by_merge(run: Run) -> list[Path]:
    read = [run.path / name for name in ("rows", "requests", "jobs", "responses", "engine", "leases")]
    read += [run.path / name for name in ("manifest.json", "prepared.json")]
    uri = run.manifest.input.uri
    return read if is_remote(uri) and not is_s3(uri) else [*read, place_of(uri)]
