"""The shards of one `submit`: those that are there, and those that `prepare` makes meanwhile.

`prepare` and `submit` work in two threads of one process then. With `--delete-sent` the requests of a shard are deleted
when nothing of it is to be sent any more, and `prepare` stays only a few shards ahead: so a dataset passes through a
disk that is smaller than its requests.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterable, Sequence

from batchkit import outcomes
from batchkit.counts import Counts
from batchkit.due import to_send
from batchkit.errors import BatchkitError, RunError, UsageError
from batchkit.jobs import OVER
from batchkit.manifests import PREPARE_AGAIN, Seal
from batchkit.responses import ANSWERS, Verdict
from batchkit.runs import Run
from batchkit.storage import remove
from batchkit.wording import counted

AHEAD = 4
"""Shards with requests on the disk at once, with `--delete-sent`: that `prepare` is writing comes on top."""


class StoppedError(Exception):
    """Raised in the thread of `prepare`: nobody wants its shards any more."""


class Feed:
    """`seals` are all shards so far by their numbers, `chosen` those that are to be worked on; both grow by `take`."""

    def __init__(
        self, seals: Iterable[Seal] = (), *, shards: str | None = None, is_open: bool = False, bounded: bool = False
    ) -> None:
        _parse_part(shards)  # for its error
        self._shards = shards
        self.seals: dict[int, Seal] = {}
        self.chosen: list[Seal] = []
        self.rows = 0
        self._changed = threading.Condition()
        self._new: list[Seal] = list(seals)
        self._begun = not is_open
        self._closed = not is_open
        self._stopped = False
        self._error: BaseException | None = None
        self._bounded = bounded
        self._waiting: set[int] = set()
        self._cleaner: Cleaner | None = None
        if not is_open:
            self.take()

    # -- the side of submit

    @property
    def stage(self) -> str:
        """What is going on while there is nothing to take."""
        return f"preparing: {counted(self.rows, 'row')}"

    @property
    def is_open(self) -> bool:
        """Whether there are, or may come, shards that `take` has not given yet. Raises what ended `prepare`."""
        with self._changed:
            self._raise()
            return bool(self._new) or not self._closed

    def take(self) -> list[Seal]:
        """The chosen shards that are new since the last call. Raises what ended `prepare`."""
        with self._changed:
            self._raise()
            new, self._new = self._new, []
        self.seals.update((seal.shard, seal) for seal in new)
        wanted = select(new, self._shards)
        self.chosen += wanted
        return wanted

    def wait(self, seconds: float) -> bool:
        """Wait for the first shards. Returns whether there is something to begin with, or nothing will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (self._begun and self._new), seconds)
            self._raise()
            return self._closed or (self._begun and bool(self._new))

    def clean(self, run: Run, *, attempts: int) -> None:
        """Delete the requests of shards that are done, where that is wanted: those of earlier times now."""
        if not self._bounded:
            return
        self._cleaner = Cleaner(run, attempts=attempts)
        for seal in list(self.seals.values()):
            with contextlib.suppress(BatchkitError):  # somebody else works on it
                if run.job_path(seal.shard).exists():
                    with run.lease(f"{seal.shard:05d}"):
                        self._cleaner.clean(seal)
            if run.bytes_of(run.requests_path(seal.shard)) is None:
                self._pass_by({seal.shard})

    def leave(self, shard: int) -> None:
        """Called while its lease is held, for the last time: nothing more is done with it now."""
        if self._cleaner is not None:
            with contextlib.suppress(BatchkitError):  # a shard that is damaged is not done
                self._cleaner.clean(self.seals[shard])
            self._pass_by({shard})

    def pass_by(self, shard: int) -> None:
        """Nothing has to be done with it, as is known without holding its lease."""
        self._pass_by({shard})

    def idle(self) -> None:
        """Nothing can be done with any shard so far: none of them may hold `prepare` up, done or not."""
        self._pass_by(self.seals.keys())

    def _pass_by(self, shards: Iterable[int]) -> None:
        with self._changed:
            self._waiting.difference_update(shards)
            self._changed.notify_all()

    def stop(self) -> None:
        """Have `prepare` end: nobody works on its shards any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    # -- the side of prepare

    def add(self, seals: Sequence[Seal]) -> None:
        """What is sealed; the first call has what was there. Waits for room. Raises `StoppedError`."""
        with self._changed:
            self._waiting.update(seal.shard for seal in seals if seal.requests and self._bounded)
            self._new += seals
            self._begun = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stopped or self._has_room())
        self.check()

    def check(self) -> None:
        """Raises `StoppedError` where nobody wants any more."""
        if self._stopped:
            raise StoppedError

    def close(self, error: BaseException | None = None) -> None:
        """Nothing more will come."""
        with self._changed:
            self._closed, self._error = True, error
            self._changed.notify_all()

    def _has_room(self) -> bool:
        return len(self._waiting) < AHEAD

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


class Cleaner:
    """Deletes requests that nobody needs."""

    def __init__(self, run: Run, *, attempts: int) -> None:
        self._run = run
        self._attempts = attempts

    def clean(self, seal: Seal) -> None:
        """Delete the requests of a shard that is done: each has an answer, or is out of attempts."""
        path = self._run.requests_path(seal.shard)
        if self._run.bytes_of(path) is None or not self._is_done(seal):
            return
        job = self._run.job(seal.shard)
        job.requests_deleted = True
        self._run.write_job(job)  # first: a file that is missing and not noted is made again
        remove(path)

    def _is_done(self, seal: Seal) -> bool:
        attempts = self._run.job(seal.shard).attempts
        if not attempts or any(attempt.state not in OVER for attempt in attempts):
            return False
        found = outcomes.load(self._run, seal)
        flying = any(outcome.in_flight and outcome.verdict not in ANSWERS for outcome in found.outcomes)
        return not flying and not to_send(found, attempts=self._attempts)


def refuse_deleted(
    run: Run, seals: Iterable[Seal], *, attempts: int, retry: frozenset[Verdict], only: frozenset[int] | None
) -> None:
    """Raise `RunError` where requests are to be sent that were deleted on purpose; `prepare` makes them again then."""
    deleted = [
        seal
        for seal in seals
        if run.job(seal.shard).requests_deleted and run.bytes_of(run.requests_path(seal.shard)) is None
    ]
    if not deleted:
        return
    with Counts(run) as counts:
        wanted = [seal.shard for seal in deleted if counts.look(seal, attempts=attempts, retry=retry, only=only)[1]]
    for shard in wanted:
        with run.lease(f"{shard:05d}"):
            job = run.job(shard)
            job.requests_deleted = False
            run.write_job(job)
    if wanted:
        names = ", ".join(f"{shard:05d}" for shard in wanted[:5]) + (" …" if len(wanted) > 5 else "")
        raise RunError(
            f"{run.name}: the requests of {counted(len(wanted), 'shard')} ({names}) were deleted when they had answers "
            "(--delete-sent)",
            hint=f"{PREPARE_AGAIN}; then the same command again",
        )


def refuse_lost(run: Run, seals: Iterable[Seal]) -> None:
    """Raise `RunError` where the requests of shards are gone: without their answers nothing would be left of them."""
    gone = [seal.shard for seal in seals if seal.requests and run.bytes_of(run.requests_path(seal.shard)) is None]
    if gone:
        raise RunError(
            f"{run.name}: the requests of {counted(len(gone), 'shard')} were deleted when they had answers "
            "(--delete-sent)",
            hint="keep the answers; or prepare the task file into a new run, and submit that",
        )


def select(seals: Iterable[Seal], shards: str | None) -> list[Seal]:
    """Those of part I of N ("I/N")."""
    first, step = _parse_part(shards)
    return [seal for seal in seals if seal.shard % step == first]


def _parse_part(shards: str | None) -> tuple[int, int]:
    """Part I of N ("I/N"): every N-th shard, so that the parts are alike however the rows are sorted. Returns the
    remainder and N."""
    if shards is None:
        return 0, 1
    found = re.fullmatch(r"(\d+)/(\d+)", shards)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(f"--shards {shards}: not a part of the run", hint="--shards 3/8 is the third part of eight")
    return int(found[1]) - 1, int(found[2])
