"""One attempt at a batch service, step by step. Every step is on the disk before the next one begins.

1. `intended`: the rows, and the tag that marks all it makes at the provider
2. the file is uploaded; `uploaded`, with its id
3. `creating`, then the create call, which is paid for and never repeated
4. `running`, with the batch's id
5. the batch ends; its files are downloaded aside, translated, and written as `responses/NNNNN.A.jsonl`
6. `collected` (or `refused`, where nothing was run)

A process that died is taken up where it was: an upload is made again, which costs nothing; a create is looked for.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from batchkit import calls
from batchkit.batches import Batch, Order, RefusedError, Service
from batchkit.errors import RunBusyError
from batchkit.jobs import Attempt, AttemptState, Remote
from batchkit.manifests import Seal, now
from batchkit.responses import UnreadableLine, parse
from batchkit.runs import Run
from batchkit.shardfiles import request_lines
from batchkit.signatures import hide_bytes
from batchkit.storage import open_read, write_whole
from batchkit.wording import counted

SHOWN_LABEL = 64
_OF_SHARD = re.compile(r"\.?(?:links-)?(\d{5,})\.")


class Tracked(msgspec.Struct, kw_only=True):
    """An attempt that this process works on. `positions` are its requests' rows, in the order of the file's lines."""

    seal: Seal
    attempt: Attempt
    positions: list[int]

    @property
    def name(self) -> str:
        return f"{self.seal.shard:05d}.{self.attempt.number}"

    @property
    def label(self) -> str:
        """How people know it."""
        return f"shard {self.seal.shard}, attempt {self.attempt.number}"

    @property
    def remote(self) -> Remote:
        if self.attempt.remote is None:
            raise AssertionError("not an attempt at a batch service")
        return self.attempt.remote


class Gathered(msgspec.Struct, kw_only=True):
    """What came back: how many requests have a line, and how many of these are failures that may pass."""

    responses: int = 0
    passing: int = 0


class ShortError(Exception):
    """The files of a batch lack requests that they should have; what they hold is on the disk."""

    def __init__(self, found: int, expected: int | None, why: str = "") -> None:
        of = f"{expected:,} that the provider should have" if expected is not None else "nobody knows how many"
        super().__init__(f"{counted(found, 'response')} came of {of}{why}")


# -- steps 1 to 4 ----------------------------------------------------------------------------------------------------


def intend(run: Run, seal: Seal, positions: Sequence[int], remote: Remote, *, backend: str) -> Tracked:
    """Step 1. The shard's lease is held."""
    remote.tag = secrets.token_hex(12)
    job = run.job(seal.shard)
    attempt = Attempt(
        number=run.next_attempt(seal.shard),
        backend=backend,
        state="intended",
        rows=seal.ranges(positions),
        started=now(),
        remote=remote,
    )
    job.attempts.append(attempt)
    run.write_job(job)
    return Tracked(seal=seal, attempt=attempt, positions=list(positions))


def take_up(run: Run, seal: Seal) -> list[Tracked]:
    """The attempts at batch services that are not over. The shard's lease is held."""
    asking = frozenset(seal.asking)
    return [
        Tracked(
            seal=seal,
            attempt=attempt,
            positions=[position for start, end in attempt.rows for position in range(start, end) if position in asking],
        )
        for attempt in run.job(seal.shard).attempts
        if attempt.at_provider
    ]


def save(run: Run, tracked: Tracked, state: AttemptState, *, message: str | None = None) -> None:
    """Put the attempt, as it is now, into the job, in `state`."""
    job = run.job(tracked.seal.shard)
    tracked.attempt.state, tracked.attempt.message = state, message
    tracked.remote.since = now()
    if state in ("collected", "refused"):
        tracked.attempt.ended = now()
    job.attempts = [tracked.attempt if kept.number == tracked.attempt.number else kept for kept in job.attempts]
    run.write_job(job)


def upload(run: Run, tracked: Tracked, service: Service, packed: Path | None = None) -> None:
    """Step 2. `packed` is the file, where it was made before the attempt."""
    with contextlib.nullcontext(packed) if packed is not None else _request_file(run, tracked, service) as path:
        tracked.remote.file_id = service.upload(path, f"batchkit-{tracked.name}-{tracked.remote.tag}.jsonl")
    save(run, tracked, "uploaded")


def create(run: Run, tracked: Tracked, service: Service) -> Batch:
    """Steps 3 and 4. Raises what `Service.create` raises; after a `DoubtfulError` the state stays `creating`."""
    tracked.remote.creates += 1
    save(run, tracked, "creating")
    batch = service.create(order_of(run, tracked))
    begin(run, tracked, batch)
    return batch


def begin(run: Run, tracked: Tracked, batch: Batch) -> None:
    """Step 4: this batch, just created or found again, is the attempt's."""
    tracked.remote.batch_id, tracked.remote.state = batch.id, batch.state
    save(run, tracked, "running")


def order_of(run: Run, tracked: Tracked) -> Order:
    """What step 3 creates; also what a create that went astray is looked for by."""
    remote = tracked.remote
    labels = {
        "batchkit_run": Path(run.name).name[:SHOWN_LABEL],
        "batchkit_shard": str(tracked.seal.shard),
        "batchkit_attempt": str(tracked.attempt.number),
    }
    return Order(
        file_id=remote.file_id or "",
        url=remote.url,
        model=run.manifest.model,
        tag=f"{remote.tag}-{remote.creates}",
        labels=labels,
        past=tuple(remote.past),
        since=dt.datetime.fromisoformat(tracked.attempt.started).timestamp(),
    )


@contextlib.contextmanager
def _request_file(run: Run, tracked: Tracked, service: Service) -> Iterator[Path]:
    """The attempt's requests in the provider's dialect, as a file that is gone at the end of the block."""
    path = run.path / "uploads" / f"{tracked.name}.jsonl"
    with calls.storing(path.parent):
        path.parent.mkdir(exist_ok=True)
    try:
        with write_whole(path) as stream:
            for line in request_lines(run, tracked.seal, tracked.attempt.rows):
                stream.write(service.request(line.removesuffix(b"\n")) + b"\n")
        yield path
    finally:
        path.unlink(missing_ok=True)


# -- steps 5 and 6 ---------------------------------------------------------------------------------------------------


def collect(run: Run, tracked: Tracked, service: Service, batch: Batch) -> Gathered:
    """Download all files of a batch that has ended, and close the attempt.

    Raises `ShortError` where requests have no line that must have one. What there is, is kept, and the attempt stays
    open: the provider may have more, and sending these requests again would be paid for again.
    """
    folder = run.path / "downloads" / tracked.name
    with calls.storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    gone = ""
    try:
        parts = []
        for index, file_id in enumerate(batch.files):
            try:
                service.download(file_id, folder / f"{index}.jsonl")
            except RefusedError as exc:
                gone = f"; {exc}"
                continue
            parts.append(folder / f"{index}.jsonl")
        gathered = _write_responses(run, tracked, service, parts)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    expected = _expected(tracked, batch)
    if gone or expected is None or gathered.responses < expected:
        raise ShortError(gathered.responses, expected, gone)
    close(run, tracked, batch)
    return gathered


def close(run: Run, tracked: Tracked, batch: Batch) -> None:
    """Step 6."""
    tracked.attempt.ending = "completed" if batch.phase == "running" else batch.phase
    tracked.remote.state, tracked.remote.files, tracked.remote.trouble = batch.state, list(batch.files), None
    save(run, tracked, "collected")


def give_up(run: Run, tracked: Tracked) -> None:
    """Close an attempt that the user says will not be made whole: its requests without a line are `missing`."""
    trouble, tracked.remote.trouble = tracked.remote.trouble, None
    save(run, tracked, "collected", message=f"given up: {trouble}")


def _write_responses(run: Run, tracked: Tracked, service: Service, parts: Sequence[Path]) -> Gathered:
    ids = run.read_ids(tracked.seal)
    wanted = {ids[position - tracked.seal.start] for position in tracked.positions}
    gathered = Gathered()
    with write_whole(run.responses_path(tracked.seal.shard, tracked.attempt.number), durable=True) as stream:
        for line in _lines(parts):
            translated = service.response(line)
            if run.manifest.has_links:  # errors quote what they are about
                translated = hide_bytes(translated)
            stream.write(translated + b"\n")
            with contextlib.suppress(UnreadableLine):
                response = parse(translated)
                if response.custom_id in wanted:
                    wanted.remove(response.custom_id)
                    gathered.responses += 1
                    gathered.passing += response.passing
    return gathered


def _expected(tracked: Tracked, batch: Batch) -> int | None:
    """How many requests must have a line: all of a batch that is complete, of another as many as the provider counts;
    None where it counts nothing and has no files, which may still come."""
    if batch.phase == "completed" and not batch.partial:
        return len(tracked.positions)
    if batch.completed is None and batch.failed is None:
        return 0 if batch.files else None
    return min((batch.completed or 0) + (batch.failed or 0), len(tracked.positions))


def _lines(parts: Sequence[Path]) -> Iterator[bytes]:
    """The lines of all files, without line feeds and blank ones."""
    for part in parts:
        with open_read(str(part)) as stream:
            for line in stream:
                if line.strip():
                    yield line.rstrip(b"\r\n")


def set_aside(run: Run, tracked: Tracked, batch: Batch) -> list[int]:
    """Close the attempt at a batch that failed validation: the requests that the provider names become `failed`, with
    its reason, and the others are to be sent again. Returns the positions of the former."""
    zero_based = any(fault.line == 0 for fault in batch.faults)  # some hosts count the lines from 0
    reasons: dict[int, str] = {}
    for fault in batch.faults:
        index = -1 if fault.line is None else fault.line - (0 if zero_based else 1)
        if 0 <= index < len(tracked.positions):
            reasons.setdefault(tracked.positions[index], f"refused by the provider: {fault.message}")
    tracked.remote.state = batch.state
    fail(run, tracked, reasons, code="refused_by_validation")
    return sorted(reasons)


def fail(run: Run, tracked: Tracked, reasons: Mapping[int, str], *, code: str) -> None:
    """Close an attempt of which nothing was run: the requests at these positions have failed for good."""
    ids = run.read_ids(tracked.seal)
    with write_whole(run.responses_path(tracked.seal.shard, tracked.attempt.number), durable=True) as stream:
        for position, reason in sorted(reasons.items()):
            error = {"code": code, "message": reason}
            line = {"custom_id": ids[position - tracked.seal.start], "response": None, "error": error}
            stream.write(msgspec.json.encode(line) + b"\n")
    tracked.attempt.ending = "failed"
    save(run, tracked, "refused", message=f"refused by the provider: {counted(len(reasons), 'request')}")


def clean_up(run: Run, shard: int) -> None:
    """Remove what an earlier process left of uploads and downloads. The shard's lease is held."""
    for path, of in _on_their_way(run):
        if of == shard and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif of == shard:
            path.unlink(missing_ok=True)


def clean_up_all(run: Run) -> None:
    """The same of all shards that no process works on: one that was killed while it wrote a file has left no attempt
    that tells of it. None of their leases may be held by this process."""
    for shard in sorted({shard for _, shard in _on_their_way(run)}):
        with contextlib.suppress(RunBusyError), run.lease(f"{shard:05d}"):
            clean_up(run, shard)


def _on_their_way(run: Run) -> list[tuple[Path, int]]:
    """Each file of an upload or download, what is written aside too, and its shard."""
    paths = [path for folder in ("uploads", "downloads") for path in (run.path / folder).glob("*")]
    return [(path, int(name[1])) for path in paths if (name := _OF_SHARD.match(path.name))]


def seconds_since(moment: str) -> float:
    """Seconds since a time that `now` gave, also in another process."""
    return (dt.datetime.now(dt.UTC) - dt.datetime.fromisoformat(moment)).total_seconds()
