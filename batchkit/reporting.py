"""Where a run stands: what `status` says."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path

import msgspec

from batchkit import elsewhere, inquiries
from batchkit.counts import Counts
from batchkit.errors import StorageError
from batchkit.inquiries import BatchStatus
from batchkit.jobs import OVER, Job
from batchkit.manifests import Seal
from batchkit.responses import ANSWERS, Verdict
from batchkit.runs import Run
from batchkit.wording import counted


class ShardStatus(msgspec.Struct, kw_only=True):
    """`state`: `sealed` (nothing of it was sent), `running`, `open` (rows to send, nothing running) or `done`."""

    shard: int
    rows: int
    requests: int
    attempts: int
    state: str
    verdicts: dict[str, int]
    reused: int = 0


class Status(msgspec.Struct, kw_only=True):
    """`prepared` is False while shards may still be added. `verdicts` add up to `rows`. `reused` rows have
    an answer of another run. `batches` are under way."""

    run: str
    model: str
    backend: str
    prepared: bool
    rows: int
    requests: int
    answers: int
    verdicts: dict[str, int]
    shards: list[ShardStatus]
    batches: list[BatchStatus] = []
    reused: int = 0

    @property
    def exit_code(self) -> int:
        """0 every row has an answer, 3 some have none, 8 rows are pending."""
        if not self.prepared or self.verdicts.get(Verdict.PENDING):
            return 8
        return 0 if self.answers == self.rows else 3


def status(run: Run | str | Path, *, ask: bool = True) -> Status:
    """Say how the rows stand; what was counted before and has not changed is not read again. Nothing is changed but the
    counts, and what machines elsewhere have answered is collected. With `ask` the providers of batches that are under
    way are asked how these stand. Raises `RunError` where the run is damaged."""
    opened = run if isinstance(run, Run) else Run.open(run)
    seals = list(opened.seals())
    with contextlib.suppress(StorageError):  # a run may be read where it cannot be written
        elsewhere.gather(opened, {seal.shard: seal for seal in seals})
    with Counts(opened) as counts:
        jobs = [opened.job(seal.shard) for seal in seals]
        shards = [_shard(counts, seal, job) for seal, job in zip(seals, jobs, strict=True)]
    totals: Counter[str] = Counter()
    for shard in shards:
        totals.update(shard.verdicts)
    return Status(
        run=opened.name,
        model=opened.manifest.model,
        backend=opened.manifest.backend,
        prepared=opened.prepared() is not None,
        rows=sum(shard.rows for shard in shards),
        requests=sum(shard.requests for shard in shards),
        answers=sum(totals[verdict] for verdict in ANSWERS),
        verdicts={verdict.value: totals[verdict] for verdict in Verdict},
        shards=shards,
        batches=inquiries.under_way(opened, seals, jobs, ask=ask),
        reused=sum(shard.reused for shard in shards),
    )


def _shard(counts: Counts, seal: Seal, job: Job) -> ShardStatus:
    attempts, tally = job.attempts, counts.of(seal, job)
    verdicts = tally.verdicts()
    if any(attempt.state not in OVER for attempt in attempts):
        state = "running"
    elif not attempts or (verdicts.get(Verdict.PENDING) and all(attempt.reused_from for attempt in attempts)):
        state = "sealed"
    else:
        state = "open" if verdicts.get(Verdict.PENDING) or verdicts.get(Verdict.MISSING) else "done"
    return ShardStatus(
        shard=seal.shard,
        rows=seal.end - seal.start,
        requests=seal.requests,
        attempts=len(attempts),
        state=state,
        verdicts=verdicts,
        reused=tally.reused,
    )


def as_text(status: Status) -> str:
    """The status for people: one line on the run, one on its rows, one for each shard that is not done."""
    done = sum(shard.state == "done" for shard in status.shards)
    lines = [
        f"{status.run}: {status.model} on {status.backend}",
        f"{counted(status.rows, 'row')}, {counted(status.requests, 'request')}; "
        f"{done:,} of {counted(len(status.shards), 'shard')} done"
        + ("" if status.prepared else "; prepare has not finished"),
        ", ".join(f"{name} {count:,}" for name, count in status.verdicts.items() if count) or "no rows",
    ]
    if status.reused:
        lines.append(f"{status.reused:,} of these answers were taken over from other runs")
    waiting = [shard for shard in status.shards if shard.state != "done"]
    for shard in waiting[:20]:
        counts = ", ".join(f"{name} {count:,}" for name, count in shard.verdicts.items())
        lines.append(f"  shard {shard.shard:05d}  {shard.state:7}  attempts {shard.attempts}  {counts}")
    if len(waiting) > 20:
        lines.append(f"  … and {len(waiting) - 20:,} more shards that are not done")
    lines += [_batch_line(batch) for batch in status.batches[:50]]
    if any(batch.state == "doubtful" for batch in status.batches):
        lines.append("batchkit submit says how doubtful attempts are settled")
    return "\n".join(lines)


def _batch_line(batch: BatchStatus) -> str:
    counts = [f"{batch.completed or 0:,} of {batch.requests:,} done"]
    counts += [f"{batch.failed:,} failed"] if batch.failed else []
    counts += [f"{batch.tokens:,} tokens"] if batch.tokens else []
    minutes = int(batch.seconds // 60)
    counts.append(f"{minutes // 60}:{minutes % 60:02d} h old")
    name = f"{batch.backend} {batch.batch}" if batch.batch else batch.backend
    line = f"  batch {batch.attempt}  {batch.state}  {', '.join(counts)}  ({name})"
    return line + (f"\n    {batch.message}" if batch.message else "")
