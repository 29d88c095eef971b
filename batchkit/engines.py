"""The engines of one `submit`, started, watched and collected by one loop in one thread.

Engines run by themselves, so all there is to do is to start them, to look at their logs, and to divide their output
when they end. `rounds` says how much one start takes, and how a request that kills the engine is found.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Mapping

import msgspec

from batchkit import sessions
from batchkit.backends import vllm
from batchkit.division import Collected, Division, Plan
from batchkit.errors import BatchkitError
from batchkit.feeds import Feed
from batchkit.manifests import Seal
from batchkit.progress import Progress
from batchkit.reports import SubmitReport
from batchkit.resolving import Resolver
from batchkit.rounds import Group, Key, Pool, most_bytes, plan_room
from batchkit.runs import Run
from batchkit.sessions import Laid
from batchkit.wording import counted
from batchkit.work import Leases, SpeedFile, Work

POLL_SECONDS = 0.25
FOLLOW_SECONDS = 2.0
EXCUSE_SECONDS = 5.0
MOST_LOST = 5
"""Engines in a row that went down with where they ran, and had answered nothing: then it may be their doing."""


class _Active(msgspec.Struct, kw_only=True):
    """One engine at work, with what it was given. `shown` is how much of it the progress has counted."""

    start: vllm.Start
    plan: Plan
    group: Group
    shown: int = 0
    division: Division | None = None
    followed: float = 0.0


class Engines:
    """The engines of one `submit`, from the first start to the last collected line."""

    def __init__(
        self,
        run: Run,
        feed: Feed,
        *,
        runner: vllm.Runner,
        work: Work,
        leases: Leases,
        report: SubmitReport,
        progress: Progress,
        resolver: Resolver | None = None,
    ) -> None:
        self._run = run
        self._feed = feed
        self._seals: Mapping[int, Seal] = feed.seals
        self._runner = runner
        self._work = work
        self._leases = leases
        self._report = report
        self._progress = progress
        self._resolver = resolver
        self._speed = SpeedFile(run, runner.args)
        self._active: dict[int, _Active] = {}
        self._excused = False
        self._lost = 0
        self._most = float("inf")

    def go(self, pool: Pool) -> None:
        """Until nothing is left that can be done now. `pool` gets its requests from `take_fresh`."""
        self._pool = pool
        for note in self._runner.notes if self._work.due else ():
            self._progress.say(note)
        try:
            while self._take_new() or self._fill() or self._active or self._waits():
                for slot in list(self._active):
                    self._look(slot)
        finally:
            self._stop_all()

    # -- starting

    def _take_new(self) -> bool:
        """Take in the shards that were sealed since the last time. Returns whether there were any."""
        new = self._feed.take()
        if new:
            found = self._work.add(new)
            self._report.remaining += found.due + found.in_flight
            self._report.in_flight += found.in_flight
            self._report.unanswered += found.unanswered
            self._progress.grow(self._report.responses + self._report.remaining)
        return bool(new)

    def take_fresh(self) -> list[Key]:
        """Requests that were not sent in this submit, as many as one start should take."""
        room = plan_room(
            due=self._work.due,
            speed=self._speed.known,
            memory=self._runner.memory(),
            disk=shutil.disk_usage(self._run.path).free,
            streams=self._runner.streams,
            replicas=self._runner.replicas,
            idle=self._runner.replicas - len(self._active),
        )
        self._most = most_bytes(room)
        return self._work.take(room)

    def _fill(self) -> bool:
        """Give every idle slot something to do. Returns whether any was given."""
        idle = [slot for slot in range(self._runner.replicas) if slot not in self._active and self._runner.is_up(slot)]
        return any([self._start(slot) for slot in idle])  # noqa: C419  # all of them, not until the first

    def _start(self, slot: int) -> bool:
        group = self._pool.take()
        if group is None:
            return False
        most = self._most if group.is_divisible else float("inf")
        laid = sessions.lay_down(self._run, self._seals, group.keys, self._resolver, most=most)
        if self._resolver is not None and (group := self._what_is_sent(group, laid)) is None:
            return True
        plan = laid.plan
        start = self._runner.start(self._run.engine_path(plan.session), slot)
        self._active[slot] = _Active(start=start, plan=plan, group=group)
        sessions.mark_running(self._run, plan)
        self._report.starts += 1
        self._report.sent += len(group.keys)
        return True

    def _what_is_sent(self, group: Group, laid: Laid) -> Group | None:
        """Of a group, not the requests whose images cannot be had, nor those for which there was no room: these go with
        the next start. None where nothing is left."""
        parts, lost = laid.plan.parts, laid.lost
        sent = {(part.shard, one) for part in parts for start, end in part.rows for one in range(start, end)}
        keys = [key for key in group.keys if key in sent]
        self._pool.put_back(laid.rest)
        if lost:
            self._progress.say(f"not sent, because of images that cannot be had: {counted(lost, 'request')}")
            self._progress.update(lost)
            self._report.responses += lost
            self._report.remaining -= lost
            self._report.unanswered += lost
        if keys:
            return msgspec.structs.replace(group, keys=keys)
        shutil.rmtree(self._run.engine_path(laid.plan.session), ignore_errors=True)
        self._pool.report(group, rest=[], answers=0, died=False)
        self._leases.release_all_but(self._busy_shards())
        return None

    def _waits(self) -> bool:
        """Whether there is something to do and no engine to do it, or will be. Waits a little then."""
        if self._work.is_empty and self._pool.is_empty:
            if self._work.is_limited or not self._feed.is_open:
                return False
            self._feed.idle()
            self._progress.update(0, note=self._feed.stage)
            time.sleep(POLL_SECONDS)
            return True
        if all(self._runner.is_up(slot) for slot in range(self._runner.replicas)):
            return False
        time.sleep(POLL_SECONDS)
        return True

    # -- watching

    def _look(self, slot: int) -> None:
        active = self._active[slot]
        end = active.start.poll(POLL_SECONDS / len(self._active))
        if end is not None:
            self._finish(slot, end)
            return
        if self._runner.streams and time.monotonic() - active.followed > FOLLOW_SECONDS:
            self._follow(active)
        done = min(active.start.done, len(active.group.keys))
        self._progress.update(done - active.shown, note=active.start.stage)
        active.shown = done

    def _follow(self, active: _Active) -> None:
        """Let `merge` see what a streaming engine has answered so far."""
        if active.division is None:
            output = self._run.engine_path(active.plan.session) / vllm.OUTPUT
            active.division = Division(self._run, active.plan, self._seals, output)
        with contextlib.suppress(OSError):  # a full disk shows again when the engine has ended; nothing is lost
            active.division.follow()
        active.followed = time.monotonic()

    def _finish(self, slot: int, end: vllm.End) -> None:
        active = self._active[slot]
        found = self._collect(active, died=end.exit_code != 0, message=f"the engine died: {end.cause.text}")
        del self._active[slot]
        if end.cause.kind == "lost" and end.exit_code:
            self._lose(active, end, found)
            return
        if self._did_not_start(end, found):
            self._pool.give_back(active.group)
            return
        rest = [key for key in active.group.keys if key not in found.answered]
        if found.died:
            self._tell_death(end, len(rest))
        else:
            self._speed.measure(end, len(active.group.keys))
        refused = end.cause.kind == "request" and not end.ready
        self._pool.report(active.group, rest=rest, answers=found.answers, died=found.died, certain=refused)
        self._condemn(end)
        self._leases.release_all_but(self._busy_shards())

    def _lose(self, active: _Active, end: vllm.End, found: Collected) -> None:
        """The engine went down with its machine: that is no fault of its requests, which another engine gets."""
        rest = [key for key in active.group.keys if key not in found.answered]
        self._tell_death(end, len(rest))
        self._lost = 0 if found.answered else self._lost + 1
        if self._lost > MOST_LOST:
            raise self._runner.explain(end)
        if rest:
            self._pool.give_back(msgspec.structs.replace(active.group, keys=rest))
        else:
            self._pool.report(active.group, rest=rest, answers=found.answers, died=False)
        self._leases.release_all_but(self._busy_shards())

    def _collect(self, active: _Active, *, died: bool, message: str) -> Collected:
        found = sessions.collect(self._run, active.plan, self._seals, died=died, message=message)
        count = len(found.answered)
        self._progress.update(count - active.shown, note="")
        self._report.responses += count
        self._report.remaining -= count
        self._report.passing += found.passing
        self._report.unanswered += count - found.answers
        return found

    def _did_not_start(self, end: vllm.End, found: Collected) -> bool:
        """Whether the engine died before it came to its requests. Raises where another start would be of no use.

        An engine that has worked before is excused once: a GPU's memory is free only some time after an engine's end.
        """
        if found.died and end.cause.kind == "disk":
            raise self._runner.explain(end)
        if end.exit_code == 0 or end.ready or found.answered or end.cause.kind == "request":
            self._excused = False
            return False
        if self._excused or self._speed.known is None or end.cause.kind not in ("memory", "other"):
            raise self._runner.explain(end)
        self._excused = True
        self._progress.say(f"vLLM did not start ({end.cause.text}), though it did before: once more")
        time.sleep(EXCUSE_SECONDS)
        return True

    def _tell_death(self, end: vllm.End, rest: int) -> None:
        self._report.deaths += 1
        again = f"; no response to {counted(rest, 'request')} of this start" if rest else ""
        self._progress.say(f"the engine died: {end.cause.text}{again}")

    def _condemn(self, end: vllm.End) -> None:
        for (shard, position), deaths in self._pool.condemned():
            custom_id = self._run.read_ids(self._seals[shard])[position - self._seals[shard].start]
            times = f"{deaths} times" if deaths > 1 else "once"
            message = f"the engine died {times} with this request, the last time alone: {end.cause.text}"
            sessions.condemn(self._run, shard, position, custom_id, message)
            self._progress.say(f"gave up request {custom_id}: the engine died {times} with it")
            self._progress.update(1)
            self._report.remaining -= 1
            self._report.responses += 1
            self._report.unanswered += 1
        nothing_else = not self._feed.is_open and not self._active and not self._pool.shards() and self._work.is_empty
        if self._pool.broken or (self._pool.doubtful and nothing_else):
            raise self._runner.explain(end)

    def _busy_shards(self) -> set[int]:
        shards = self._pool.shards() | self._work.shards()
        return shards.union(*({part.shard for part in active.plan.parts} for active in self._active.values()))

    # -- ending

    def _stop_all(self) -> None:
        """However we leave: end the engines, and keep what they have written."""
        left = list(self._active.values())
        self._active = {}
        for active in left:
            active.start.stop()
        for active in left:
            # What cannot be written now, on a full disk, is still in the engine's folder for the next submit.
            with contextlib.suppress(BatchkitError):
                self._collect(active, died=True, message="batchkit was stopped")
