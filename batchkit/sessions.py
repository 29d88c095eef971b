"""One engine start on the disk: `RUN/engine/<session>/`, from the plan to the responses.

The order of the steps is what makes a kill between any two of them harmless:

1. `plan.json`, then `input.jsonl`
2. the attempts, `intended`, in the jobs
3. the engine; its identity is on the disk before it begins
4. the attempts, `running`
5. the engine writes `output.jsonl`
6. `responses/NNNNN.A.jsonl`, each whole, then its attempt, `collected` or `died`
7. the folder is deleted

A folder that is found later is taken up at step 6: what is in the output is divided as if the engine had just ended.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import secrets
import shutil
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from batchkit.backends import vllm
from batchkit.division import Collected, Division, Part, Plan
from batchkit.errors import RowError, RunBusyError
from batchkit.jobs import OVER, Attempt
from batchkit.manifests import Seal, now
from batchkit.resolving import Resolved, Resolver, record
from batchkit.rounds import Key
from batchkit.runs import Run
from batchkit.shardfiles import request_lines
from batchkit.storage import settle, sync_folder, write_whole

BACKEND = "vllm"
ABANDONED_SECONDS = 3600
"""A folder without a plan belongs to a process that is making it, or died then: after an hour, to one that died."""


class Recovered(msgspec.Struct, kw_only=True):
    """What an earlier batchkit left: `engines` still ran."""

    sessions: int = 0
    engines: int = 0
    responses: int = 0


class Laid(msgspec.Struct, frozen=True, kw_only=True):
    """A plan whose input is there. Of what it was to take, so many are `lost`, recorded as failed; for `rest` there was
    no room."""

    plan: Plan
    lost: int = 0
    rest: list[Key] = []


# -- before the engine -----------------------------------------------------------------------------------------------


def lay_down(
    run: Run,
    seals: Mapping[int, Seal],
    keys: Sequence[Key],
    resolver: Resolver | None = None,
    *,
    most: float = float("inf"),
) -> Laid:
    """Steps 1 and 2: the plan, the input, the intent. The shards' leases are held.

    `resolver` is there for a run with links: what it cannot resolve is recorded as failed, and not in the plan, nor is
    what would make the input larger than `most` bytes.
    """
    lost: set[Key] = set()
    rest: list[Key] = []
    session = f"{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
    plan = _plan(run, seals, session, keys)
    folder = run.engine_path(session)
    folder.mkdir(parents=True)
    _write_plan(folder, plan)
    sync_folder(folder.parent)
    if resolver is None:
        with write_whole(folder / vllm.INPUT) as stream:
            for part in plan.parts:
                for line in request_lines(run, seals[part.shard], part.rows):
                    stream.write(line)
    else:
        lost, rest = _write_resolved(run, seals, plan, resolver, most)
        if lost or rest:
            plan = _plan(run, seals, session, [key for key in keys if key not in lost.union(rest)])
            _write_plan(folder, plan)
    for part in plan.parts:
        job = run.job(part.shard)
        job.attempts.append(
            Attempt(
                number=part.attempt, backend=BACKEND, state="intended", rows=part.rows, started=now(), session=session
            )
        )
        run.write_job(job)
    return Laid(plan=plan, lost=len(lost), rest=rest)


def _plan(run: Run, seals: Mapping[int, Seal], session: str, keys: Sequence[Key]) -> Plan:
    rows: dict[int, list[int]] = {}
    for shard, position in sorted(keys):
        rows.setdefault(shard, []).append(position)
    parts = [
        Part(shard=shard, attempt=run.next_attempt(shard), rows=seals[shard].ranges(positions))
        for shard, positions in rows.items()
    ]
    return Plan(session=session, parts=parts)


def _write_plan(folder: Path, plan: Plan) -> None:
    with write_whole(folder / "plan.json", durable=True) as stream:
        stream.write(msgspec.json.encode(plan))


def _write_resolved(
    run: Run, seals: Mapping[int, Seal], plan: Plan, resolver: Resolver, most: float
) -> tuple[set[Key], list[Key]]:
    """Write the input with its links resolved. Returns what could not be, which is recorded, and what did not fit."""
    folder = run.engine_path(plan.session)
    faults: dict[int, dict[int, RowError]] = {part.shard: {} for part in plan.parts}
    rest: list[Key] = []
    size = 0
    try:
        with (
            write_whole(folder / vllm.INPUT) as stream,
            contextlib.closing(_resolved(seals, plan, resolver)) as requests,
        ):
            for shard, (position, line, fault) in requests:
                if fault is not None:
                    faults[shard][position] = fault
                    continue
                if size and size + len(line) + 1 > most:
                    rest = [key for key in _keys(seals, plan) if key >= (shard, position)]
                    break
                size += stream.write(line + b"\n")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    for shard, of_shard in faults.items():
        record(run, seals[shard], of_shard, backend=BACKEND)
    return {(shard, position) for shard, of_shard in faults.items() for position in of_shard}, rest


def _resolved(seals: Mapping[int, Seal], plan: Plan, resolver: Resolver) -> Generator[tuple[int, Resolved]]:
    for part in plan.parts:
        with contextlib.closing(resolver.lines(seals[part.shard], part.rows)) as lines:
            for resolved in lines:
                yield part.shard, resolved


def _keys(seals: Mapping[int, Seal], plan: Plan) -> Iterator[Key]:
    """The requests of a plan, in order."""
    for part in plan.parts:
        asking = frozenset(seals[part.shard].asking)
        rows = (position for start, end in part.rows for position in range(start, end))
        yield from ((part.shard, position) for position in rows if position in asking)


def mark_running(run: Run, plan: Plan) -> None:
    """Step 4."""
    for part in plan.parts:
        _mark(run, plan, part, "running", None)


# -- after the engine ------------------------------------------------------------------------------------------------


def collect(run: Run, plan: Plan, seals: Mapping[int, Seal], *, died: bool, message: str) -> Collected:
    """Steps 6 and 7: divide the output among the shards, and close the attempts.

    `died`: the engine is known to have ended early, for which `message` is the reason; lines that say so have the same
    effect. May be called again after a kill at any point.
    """
    folder = run.engine_path(plan.session)
    found = Division(run, plan, seals, folder / vllm.OUTPUT).finish()
    found.died = found.died or died
    for part in plan.parts:
        _mark(run, plan, part, "died" if found.died else "collected", message if found.died else None)
    shutil.rmtree(folder, ignore_errors=True)
    return found


def condemn(run: Run, shard: int, position: int, custom_id: str, message: str) -> None:
    """Give a request up: write the failure that the engine could not, as the response of its last attempt."""
    job = run.job(shard)
    attempt = next(a for a in reversed(job.attempts) if any(start <= position < end for start, end in a.rows))
    line = {"custom_id": custom_id, "response": None, "error": {"code": "engine_died", "message": message}}
    with write_whole(run.responses_path(shard, attempt.number), durable=True) as stream:
        stream.write(msgspec.json.encode(line) + b"\n")
    attempt.state, attempt.message = "collected", message
    run.write_job(job)


def _mark(
    run: Run, plan: Plan, part: Part, state: Literal["running", "collected", "died"], message: str | None
) -> None:
    job = run.job(part.shard)
    for attempt in job.attempts:
        if attempt.session == plan.session and attempt.state in ("intended", "running"):
            attempt.state, attempt.message = state, message
            attempt.ended = None if state == "running" else now()
            run.write_job(job)


# -- what an earlier batchkit left -----------------------------------------------------------------------------------


def recover(run: Run, seals: Mapping[int, Seal]) -> Recovered:
    """End engines whose batchkit has died, and collect what they answered. Sessions that are worked on stay alone."""
    counts = Recovered()
    root = run.path / "engine"
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        plan = _read_plan(folder) if folder.is_dir() else None
        if plan is not None:
            with contextlib.suppress(RunBusyError), _leases(run, plan):
                counts.sessions += 1
                _recover_one(run, plan, seals, counts)
    _close_lost(run, seals)
    return counts


def _close_lost(run: Run, seals: Mapping[int, Seal]) -> None:
    """Close the attempts of engines whose folders are gone: with another machine, where the run is in a bucket. What
    had come of their responses stays."""
    for shard in seals:
        if _lost(run, shard):
            with contextlib.suppress(RunBusyError), run.lease(f"{shard:05d}"):
                lost = _lost(run, shard)  # looked at again: it may have ended before we held the lease
                job = run.job(shard)
                for attempt in job.attempts:
                    if attempt.number in lost:
                        settle(run.responses_path(shard, attempt.number))
                        attempt.state, attempt.ended = "died", now()
                        attempt.message = "the machine that ran the engine ended, or lost its folder"
                if lost:
                    run.write_job(job)


def _lost(run: Run, shard: int) -> set[int]:
    return {
        attempt.number
        for attempt in run.job(shard).attempts
        if attempt.session is not None and attempt.state not in OVER and not run.engine_path(attempt.session).exists()
    }


def _recover_one(run: Run, plan: Plan, seals: Mapping[int, Seal], counts: Recovered) -> None:
    folder = run.engine_path(plan.session)
    counts.engines += vllm.end_left_over(folder)
    if (folder / vllm.IDENTITY).exists():
        found = collect(run, plan, seals, died=True, message="batchkit ended before the engine did")
        counts.responses += len(found.answered)
        return
    for part in plan.parts:  # nothing was sent: the intent is all there was
        job = run.job(part.shard)
        kept = [attempt for attempt in job.attempts if attempt.session != plan.session]
        if len(kept) < len(job.attempts):
            job.attempts = kept
            run.write_job(job)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _leases(run: Run, plan: Plan) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for part in plan.parts:
            stack.enter_context(run.lease(f"{part.shard:05d}"))
        yield


def _read_plan(folder: Path) -> Plan | None:
    try:
        return msgspec.json.decode((folder / "plan.json").read_bytes(), type=Plan)
    except OSError:
        if time.time() - folder.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
        return None
