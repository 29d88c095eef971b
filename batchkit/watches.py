"""Moving one attempt at a batch service forward: what each look at it does, and what that means for the others.

Nothing here waits: a watch says when it wants to be looked at next. What may pass by itself (the network, a provider
that is busy) costs nothing but time.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Literal

import msgspec

from batchkit import attempts
from batchkit.attempts import Gathered, ShortError, Tracked
from batchkit.batches import Batch, DoubtfulError, PassingError, RefusedError, Service
from batchkit.errors import CredentialsError
from batchkit.handover import Pace
from batchkit.packing import Packer
from batchkit.progress import Progress
from batchkit.runs import Run

LONGEST_PAUSE = 300.0
ADOPT_LOOKS = 4
"""A process that starts late looks for a batch several times, too, before it calls it doubtful."""

EventKind = Literal["collected", "tokens", "set-aside", "refused", "trouble", "doubtful"]


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """What became of an attempt that needs no more looks (after `tokens` it does, later).

    `collected`: over, with what came back. `tokens`: it waits for its turn. `set-aside`: it failed validation, `named`
    are the positions at fault. `refused`: the provider will not do it, `message` says why. `trouble`: it has
    ended, and cannot be collected whole now. `doubtful`: nobody knows whether it was created.
    """

    kind: EventKind
    message: str = ""
    batch: Batch | None = None
    gathered: Gathered | None = None
    named: list[int] = []
    too_large: bool = False


class Watch(msgspec.Struct, kw_only=True):
    """An attempt under way. `next_look` is of the monotonic clock."""

    tracked: Tracked
    next_look: float = 0.0
    batch: Batch | None = None
    troubles: int = 0
    looks: int = 0
    cancel_sent: bool = False

    @property
    def token_waits(self) -> int:
        """How often it failed because too many tokens were enqueued, in earlier processes, too."""
        return len(self.tracked.remote.past)

    @property
    def is_created(self) -> bool:
        return self.tracked.attempt.state not in ("intended", "uploaded")

    @property
    def is_in_doubt(self) -> bool:
        """Whether it is not known if it was created."""
        return self.tracked.attempt.state in ("creating", "doubtful")

    @property
    def counts(self) -> bool:
        """Whether its tokens are in the provider's queue."""
        return self.tracked.attempt.state in ("creating", "running")


class Clerk:
    """Does the steps, through one service."""

    def __init__(
        self, run: Run, service: Service, pace: Pace, progress: Progress, packer: Packer | None = None
    ) -> None:
        self._packer = packer
        self._run = run
        self._service = service
        self._pace = pace
        self._progress = progress
        self.proven = False

    def look(self, watch: Watch, *, may_create: Callable[[], bool]) -> Event | None:
        """Do what can be done now. `may_create` is asked right before each step towards a new batch."""
        state, created = watch.tracked.attempt.state, watch.is_created
        try:
            if state == "intended" and may_create():
                self._upload(watch.tracked)
                state = "uploaded"
            if state == "uploaded" and may_create():
                event = self._create(watch)
            elif state in ("creating", "doubtful"):
                event = self._look_for(watch)
            elif state == "running":
                event = self._check(watch)
            else:
                event = None
                self._later(watch)
            watch.troubles = 0
        except PassingError as exc:
            self._excuse(watch, str(exc))
            return None
        except RefusedError as exc:
            return self._refused(watch, exc, created=created)
        return event

    def _upload(self, tracked: Tracked) -> None:
        if self._packer is None:
            attempts.upload(self._run, tracked, self._service)
            return
        shard = tracked.seal.shard
        attempts.upload(self._run, tracked, self._service, self._packer.file_of(shard, tracked.positions))
        self._packer.remove(shard)

    def _later(self, watch: Watch, seconds: float | None = None) -> None:
        watch.next_look = time.monotonic() + (self._pace.poll if seconds is None else seconds)

    def _excuse(self, watch: Watch, message: str) -> None:
        if watch.troubles == 0:
            self._progress.say(f"{watch.tracked.label}: {message}; it is tried again")
        watch.troubles += 1
        self._later(watch, min(self._pace.poll * 2 ** min(watch.troubles - 1, 10), LONGEST_PAUSE))

    # -- creating

    def _create(self, watch: Watch) -> Event | None:
        tracked = watch.tracked
        try:
            watch.batch = attempts.create(self._run, tracked, self._service)
        except DoubtfulError as exc:
            self._progress.say(f"{tracked.label}: {exc}; whether the batch was created is being looked into")
            self._later(watch, min(self._pace.poll, 2.0))
            return None
        except (PassingError, CredentialsError):
            attempts.save(self._run, tracked, "uploaded")  # it is certain that nothing was created
            raise
        self._later(watch, min(self._pace.poll, 5.0))
        return None

    def _look_for(self, watch: Watch) -> Event | None:
        tracked = watch.tracked
        try:
            batch = self._service.find(attempts.order_of(self._run, tracked))
        except PassingError:
            if _age(tracked) <= ADOPT_LOOKS * self._pace.adopt:
                raise
            batch = None  # a list that is never readable must not hold up all the others
        if batch is not None:
            attempts.begin(self._run, tracked, batch)
            self._progress.say(f"{tracked.label}: found batch {batch.id} at the provider, and adopted it")
            self._later(watch, 0.0)
            return None
        if tracked.attempt.state == "doubtful":
            return Event(kind="doubtful")
        watch.looks += 1
        age = _age(tracked)
        if age > self._pace.adopt and (watch.looks >= ADOPT_LOOKS or age > ADOPT_LOOKS * self._pace.adopt):
            attempts.save(self._run, tracked, "doubtful", message="the provider does not list its batch")
            return Event(kind="doubtful")
        self._later(watch, min(self._pace.poll, 10.0))
        return None

    def _refused(self, watch: Watch, exc: RefusedError, *, created: bool) -> Event:
        """Before it is created that is the end of it; later, what may run at the provider stays as it is."""
        if created:
            return self._trouble(watch, str(exc))
        attempts.save(self._run, watch.tracked, "refused", message=str(exc))
        return Event(kind="refused", message=str(exc), too_large=exc.too_large)

    # -- watching and collecting

    def _check(self, watch: Watch) -> Event | None:
        tracked = watch.tracked
        watch.batch = batch = self._service.check(tracked.remote.batch_id or "")
        if batch.phase == "running":
            if tracked.remote.state != batch.state:
                tracked.remote.state = batch.state
                attempts.save(self._run, tracked, "running")
            self._later(watch)
            return None
        if batch.phase == "failed" and not batch.files and not batch.completed:
            return self._failed(watch, batch)
        return self._collect(watch, batch)

    def _failed(self, watch: Watch, batch: Batch) -> Event:
        """Nothing of it was run, and nothing is paid for."""
        tracked = watch.tracked
        if batch.waits_for_tokens:
            tracked.remote.past.append(batch.id)
            tracked.remote.batch_id = tracked.remote.state = None
            attempts.save(self._run, tracked, "uploaded", message=batch.faults[0].message)
            return Event(kind="tokens", batch=batch, message=batch.faults[0].message)
        lines = {fault.line for fault in batch.faults if fault.line is not None}
        # A fault of every line is the file's (a wrong model, say), as long as no other batch was accepted.
        if lines and (self.proven or len(lines) < len(tracked.positions) or len(tracked.positions) == 1):
            named = attempts.set_aside(self._run, tracked, batch)
            return Event(kind="set-aside", batch=batch, named=named, message=batch.faults[0].message)
        message = "; ".join(fault.message for fault in batch.faults[:3]) or "the provider gives no reason"
        tracked.attempt.ending, tracked.remote.state = "failed", batch.state
        attempts.save(self._run, tracked, "refused", message=message)
        return Event(kind="refused", batch=batch, message=message)

    def _collect(self, watch: Watch, batch: Batch) -> Event | None:
        tracked = watch.tracked
        try:
            gathered = attempts.collect(self._run, tracked, self._service, batch)
        except ShortError as exc:
            first = tracked.remote.state != batch.state
            if first:  # its age counts from here
                tracked.remote.state = batch.state
                attempts.save(self._run, tracked, "running", message=str(exc))
            if tracked.remote.trouble or (not first and _age(tracked) > self._pace.settle):
                return self._trouble(watch, str(exc))
            if first:
                self._progress.say(f"{tracked.label}: {exc}; its files are looked at again")
            self._later(watch)
            return None
        return Event(kind="collected", batch=batch, gathered=gathered)

    def _trouble(self, watch: Watch, message: str) -> Event:
        """It has ended or is gone, and what it owes cannot be had now: another submit looks again, the user decides."""
        remote = watch.tracked.remote
        if remote.trouble != message:
            remote.trouble = message
            attempts.save(self._run, watch.tracked, watch.tracked.attempt.state, message=message)
        return Event(kind="trouble", message=message)

    def cancel(self, watch: Watch) -> None:
        """Have the provider end a batch that runs."""
        watch.cancel_sent = True
        try:
            self._service.cancel(watch.tracked.remote.batch_id or "")
        except (PassingError, RefusedError) as exc:  # it may have ended by itself
            self._progress.say(f"{watch.tracked.label}: {exc}")

    # -- the end

    def delete_remote(self, tracked: Tracked) -> None:
        """Remove the files of an attempt that was collected whole."""
        remote = tracked.remote
        try:
            for file_id in [remote.file_id, *remote.files]:
                if file_id:
                    self._service.delete(file_id)
        except (PassingError, RefusedError, CredentialsError) as exc:
            self._progress.say(f"{tracked.label}: its files could not be removed: {exc}")
            return
        remote.deleted = True
        attempts.save(self._run, tracked, tracked.attempt.state, message=tracked.attempt.message)

    def withdraw(self, tracked: Tracked, why: str) -> None:
        """Give up an attempt that was not created; its upload is removed where that is easy."""
        with contextlib.suppress(PassingError, RefusedError, CredentialsError):
            if tracked.remote.file_id:
                self._service.delete(tracked.remote.file_id)
        attempts.save(self._run, tracked, "refused", message=why)


def _age(tracked: Tracked) -> float:
    """Seconds since the last change of the attempt, also across restarts."""
    return attempts.seconds_since(tracked.remote.since or tracked.attempt.started)
