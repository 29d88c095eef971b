"""Attempts on machines that have nothing but two URLs: given out by `presign`, and taken back from the bucket.

1. where only some requests of the shard are due, an input of their own is written to `presigned/`
2. the attempt, `elsewhere`, with the names of its input and output and the time until which its URLs hold
3. the URLs are given out; nobody is asked how it goes
4. the output comes; `gather` finds it, writes its whole lines to `responses/NNNNN.A.jsonl`, closes it as `collected`
5. or the time is over and nothing came: `died`, and its requests are due again

An output that comes later than that is collected all the same, as this attempt's. Every step is under the lease of
the shard.
"""

from __future__ import annotations

import datetime as dt
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from batchkit import s3
from batchkit.errors import RunBusyError
from batchkit.jobs import Attempt, Elsewhere
from batchkit.manifests import Seal, now
from batchkit.responses import ANSWERS, UnreadableLine, parse
from batchkit.runs import Run
from batchkit.signatures import hide_bytes
from batchkit.storage import open_read, remove, write_whole
from batchkit.wording import counted

if TYPE_CHECKING:
    from batchkit.resolving import Resolver

BACKEND = "vllm"
FOLDER = "presigned"
INPUT = ".input.jsonl"
SHOWN = 5
GRACE_SECONDS = 300.0
"""After its URL has expired an upload that had begun goes on, and clocks differ."""


class Gathered(msgspec.Struct, kw_only=True):
    """`outputs` were collected, with `responses` whole lines; `torn` of them ended in half a line. `expired` attempts
    were closed without any. `faults` name what is not as it should be, `busy` is set where another process holds a
    shard of which there is news."""

    outputs: int = 0
    responses: int = 0
    torn: int = 0
    expired: int = 0
    faults: list[str] = []
    busy: RunBusyError | None = None

    def __str__(self) -> str:
        parts = []
        if self.outputs:
            torn = f" ({self.torn} of them cut off in the middle of a line)" if self.torn else ""
            parts.append(
                f"collected {counted(self.responses, 'response')} of {counted(self.outputs, 'machine')} elsewhere{torn}"
            )
        if self.expired:
            parts.append(f"expired elsewhere without an output, and due again: {counted(self.expired, 'attempt')}")
        more = [f"… and {len(self.faults) - SHOWN:,} more"] if len(self.faults) > SHOWN else []
        return "\n  ".join(["; ".join(parts), *self.faults[:SHOWN], *more])

    def note(self, run: Run, name: str, what: str) -> None:
        next_step = f"batchkit presign {run.name} gives out, and submit sends, what has no response"
        self.faults.append(f"{run.name}/{name}: {what}; {next_step}")


# -- giving out ------------------------------------------------------------------------------------------------------


def give_out(
    run: Run, seal: Seal, positions: Sequence[int], until: dt.datetime, resolver: Resolver | None = None
) -> Attempt | None:
    """Steps 1 and 2; `resolver` is there for a run with links. None where nothing can be given out. The shard's lease
    is held."""
    _remove_orphans(run, seal.shard)
    if resolver is not None and not (positions := _sendable(run, seal, positions, resolver)):
        return None
    number = run.next_attempt(seal.shard)
    rows = seal.ranges(positions)
    # Nobody else ever writes under this name: not what was given out before a `submit --no-resume` either.
    name = f"{FOLDER}/{seal.shard:05d}.{number}-{secrets.token_hex(4)}"
    source = run.requests_path(seal.shard).relative_to(run.path).as_posix()
    if len(positions) < seal.requests or resolver is not None:
        source = f"{name}{INPUT}"
        _write_input(run, seal, rows, run.path / source, resolver)
    attempt = Attempt(
        number=number,
        backend=BACKEND,
        state="elsewhere",
        rows=rows,
        started=now(),
        elsewhere=Elsewhere(input=source, output=f"{name}.jsonl", expires=until.isoformat()),
    )
    job = run.job(seal.shard)
    job.attempts.append(attempt)
    run.write_job(job)
    return attempt


def _remove_orphans(run: Run, shard: int) -> None:
    """Remove inputs whose makers were killed before step 2: nobody has their URLs, and there may be signatures in
    them."""
    if not s3.is_s3(run.name):
        return
    known = {attempt.elsewhere.input for attempt in run.job(shard).attempts if attempt.elsewhere is not None}
    start = f"{FOLDER}/{shard:05d}."
    for found in s3.listed(f"{run.name}/{start}"):
        name = start + found.name
        if name.endswith(INPUT) and name not in known:
            remove(run.path / name)


def renew(run: Run, seal: Seal, number: int, until: dt.datetime, resolver: Resolver | None = None) -> Attempt:
    """The attempt goes on until then, with new URLs for the same files, and in them. The shard's lease is held."""
    job = run.job(seal.shard)
    attempt = next(attempt for attempt in job.attempts if attempt.number == number)
    if attempt.elsewhere is None:
        raise AssertionError("not an attempt elsewhere")
    if until <= _moment(attempt.elsewhere):  # what was given out before holds longer, and so do the URLs in its input
        return attempt
    if resolver is not None:
        _write_input(run, seal, attempt.rows, run.path / attempt.elsewhere.input, resolver)
    attempt.elsewhere.expires = until.isoformat()
    run.write_job(job)
    return attempt


def open_in(run: Run, shard: int) -> list[Attempt]:
    """The attempts of a shard that are elsewhere now."""
    return [attempt for attempt in run.job(shard).attempts if attempt.state == "elsewhere"]


def requests_out(run: Run, seals: Iterable[Seal]) -> int:
    """How many requests are on machines elsewhere now."""
    return sum(requests_in(seal, attempt) for seal in seals for attempt in open_in(run, seal.shard))


def requests_in(seal: Seal, attempt: Attempt) -> int:
    """How many requests an attempt took: rows without one may lie between them."""
    asking = frozenset(seal.asking)
    return sum(position in asking for start, end in attempt.rows for position in range(start, end))


def _write_input(run: Run, seal: Seal, rows: Sequence[tuple[int, int]], path: Path, resolver: Resolver | None) -> None:
    from batchkit.shardfiles import request_lines  # with all that makes requests: `merge` needs none of it

    path.parent.mkdir(exist_ok=True)
    with write_whole(path) as stream:
        if resolver is None:
            for line in request_lines(run, seal, rows):
                stream.write(line)
        else:
            for resolved in resolver.lines(seal, rows):
                if resolved.fault is None:
                    stream.write(resolved.line + b"\n")
    run.leave(path)


def _sendable(run: Run, seal: Seal, positions: Sequence[int], resolver: Resolver) -> list[int]:
    """Those of the requests that can be resolved; that the others cannot is recorded."""
    from batchkit.resolving import record  # with all that makes requests

    resolved = resolver.lines(seal, seal.ranges(positions))
    faults = {one.position: one.fault for one in resolved if one.fault is not None}
    record(run, seal, faults, backend=BACKEND)
    return [position for position in positions if position not in faults]


# -- taking back -----------------------------------------------------------------------------------------------------


def gather(run: Run, seals: Mapping[int, Seal], *, close: bool = True) -> Gathered:
    """Collect the outputs that have come; with `close`, end the attempts that have expired without any.

    A shard that another process holds is left alone. Nothing to do, and nothing asked, where nothing was given out.
    """
    gathered = Gathered()
    shards = [shard for shard in seals if any(attempt.elsewhere for attempt in run.job(shard).attempts)]
    if shards:
        run.refresh()
    for shard in shards:
        if any(_has_news(run, attempt, close=close) for attempt in run.job(shard).attempts):
            try:
                with run.lease(f"{shard:05d}"):
                    _gather_shard(run, seals[shard], gathered, close=close)
            except RunBusyError as exc:
                gathered.busy = exc
    return gathered


def give_up(run: Run, seals: Mapping[int, Seal]) -> int:
    """Close all attempts that are elsewhere, after `gather`: their requests are due again. Returns how many there were.

    Raises `RunBusyError` where another process holds one of the shards.
    """
    count = 0
    for shard in seals:
        if open_in(run, shard):
            with run.lease(f"{shard:05d}"):
                job = run.job(shard)
                for attempt in job.attempts:
                    if attempt.state == "elsewhere":
                        _close(run, attempt, "cancelled here; what it still puts into the bucket is collected")
                        count += 1
                run.write_job(job)
    return count


def forget(run: Run, shard: int) -> None:
    """Remove what `presigned/` holds of a shard. The shard's lease is held."""
    for attempt in run.job(shard).attempts:
        if attempt.elsewhere is not None:
            _remove_input(run, attempt.elsewhere)
            remove(run.path / attempt.elsewhere.output)


def _has_news(run: Run, attempt: Attempt, *, close: bool) -> bool:
    place = attempt.elsewhere
    if place is None:
        return False
    version = run.version_of(run.path / place.output)
    return (version is not None and version != place.version) or (close and _is_expired(attempt))


def _is_expired(attempt: Attempt) -> bool:
    if attempt.state != "elsewhere" or attempt.elsewhere is None:
        return False
    return (dt.datetime.now(dt.UTC) - _moment(attempt.elsewhere)).total_seconds() > GRACE_SECONDS


def _moment(place: Elsewhere) -> dt.datetime:
    return dt.datetime.fromisoformat(place.expires)


def _gather_shard(run: Run, seal: Seal, gathered: Gathered, *, close: bool) -> None:
    job = run.job(seal.shard)  # read again: another process may have collected before we held the lease
    for attempt in job.attempts:
        place = attempt.elsewhere
        if place is None or not _has_news(run, attempt, close=close):
            continue
        output = run.path / place.output
        version = run.version_of(output)
        if version is None:
            _close(run, attempt, f"its URLs expired at {place.expires}, and no output has come")
            gathered.expired += 1
            gathered.note(run, place.output, f"has not come, and its URLs expired at {place.expires}")
        else:
            _collect(run, seal, attempt, run.fetch(output), gathered)
            place.version = version
            attempt.state, attempt.ended, attempt.message = "collected", now(), None
            _remove_input(run, place)
        run.write_job(job)
        run.leave(output)


def _close(run: Run, attempt: Attempt, message: str) -> None:
    attempt.state, attempt.ended, attempt.message = "died", now(), message
    if attempt.elsewhere is not None:
        _remove_input(run, attempt.elsewhere)  # what has not begun yet never will


def _remove_input(run: Run, place: Elsewhere) -> None:
    if place.input.startswith(FOLDER):
        remove(run.path / place.input)


# -- outputs ---------------------------------------------------------------------------------------------------------


def _collect(run: Run, seal: Seal, attempt: Attempt, output: Path, gathered: Gathered) -> None:
    """Write the whole lines of the output as the attempt's responses. Where the same command has run before, an answer
    of that which this output lacks stays."""
    target = run.responses_path(seal.shard, attempt.number)
    before = _judged(target) if any(path == target for _, path in run.responses_paths(seal.shard)) else {}
    new = _judged(output)
    count = 0
    with write_whole(target, durable=True) as stream:
        for line, custom_id in _whole_lines(output):
            if custom_id is None or new[custom_id] or not before.get(custom_id):
                stream.write((hide_bytes(line) if run.manifest.has_links else line) + b"\n")
                count += 1
        for line, custom_id in _whole_lines(target) if before else ():
            if custom_id is not None and not new.get(custom_id) and (before[custom_id] or custom_id not in new):
                stream.write(line + b"\n")
    gathered.outputs += 1
    gathered.responses += count
    torn = _is_torn(output)
    gathered.torn += torn
    asked = requests_in(seal, attempt)
    if torn or len(new) < asked:
        end = ", and ends in the middle of a line" if torn else ""
        name = output.relative_to(run.path).as_posix()
        gathered.note(run, name, f"has {len(new):,} of {counted(asked, 'response')}{end}")


def _judged(path: Path) -> dict[str, bool]:
    """For each custom_id in a file, whether there is an answer to it."""
    found: dict[str, bool] = {}
    for line, custom_id in _whole_lines(path):
        if custom_id is not None:
            found[custom_id] = found.get(custom_id, False) or parse(line).verdict in ANSWERS
    return found


def _whole_lines(path: Path) -> Iterator[tuple[bytes, str | None]]:
    """The lines, without line feeds and blank ones, each with its custom_id, None where it is no response. The last one
    needs no line feed (run_batch writes none to a URL), but must be whole then."""
    with open_read(str(path)) as stream:
        for line in stream:
            if not line.strip():
                continue
            try:
                yield line.rstrip(b"\r\n"), parse(line).custom_id
            except UnreadableLine:
                if line.endswith(b"\n"):
                    yield line.rstrip(b"\r\n"), None


def _is_torn(path: Path) -> bool:
    last = b""
    with open_read(str(path)) as stream:
        for line in stream:
            last = line
    if last.endswith(b"\n") or not last.strip():
        return False
    try:
        parse(last)
    except UnreadableLine:
        return True
    return False
