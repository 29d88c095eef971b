"""The batches of one `submit`, created, watched and collected by one loop in one thread.

Batches run by themselves, so all there is to do is to hand over what there is room for, to look at each now and then,
and to send again what came back undone. `watches` moves a single attempt, `attempts` keeps it on the disk.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

from batchkit import attempts, outcomes
from batchkit.attempts import Tracked
from batchkit.batches import Service
from batchkit.costs import spent_on
from batchkit.due import to_retry
from batchkit.errors import BatchkitError, RunBusyError, ServiceError
from batchkit.feeds import Feed
from batchkit.fetching import NOT_NOW
from batchkit.handover import Cost, Settings
from batchkit.jobs import OVER, Attempt, Remote
from batchkit.limits import Limits
from batchkit.manifests import Seal
from batchkit.packing import Packed, Packer
from batchkit.parcels import Parcel
from batchkit.progress import BoardRow, Progress
from batchkit.queues import Queue
from batchkit.reports import SubmitReport
from batchkit.resolving import record
from batchkit.runs import Run
from batchkit.watches import Clerk, Event, Watch
from batchkit.wording import counted
from batchkit.work import Leases

TOKEN_WAITS = 4
"""So often an attempt that is alone in the queue of tokens waits, before it is cut in two."""

MOST_REFUSALS = 3
"""So many shards refused, and none accepted: it is not the shards."""

MOST_DOUBTS = 3
"""So many creates in doubt, and none that went through: the provider does not work."""

SLICE_SECONDS = 1.0
REFUSED_HINT = "nothing of it was run or paid for; mend the cause and run the same again"


class Services:
    """The batches of one `submit` at one service."""

    def __init__(
        self,
        run: Run,
        feed: Feed,
        *,
        service: Service,
        limits: Limits,
        settings: Settings,
        host: str | None,
        estimate: Callable[[Seal, Sequence[int]], Cost],
        leases: Leases,
        report: SubmitReport,
        progress: Progress,
        packer: Packer | None = None,
    ) -> None:
        self._run = run
        self._service = service
        self._packer = packer
        self._settings = settings
        self._host = host
        self._estimate = estimate
        self._leases = leases
        self._report = report
        self._progress = progress
        self._clerk = Clerk(run, service, settings.pace, progress, packer)
        self._seals: Sequence[Seal] = feed.chosen
        self._queue = Queue(run, feed, limits=limits, settings=settings, leases=leases, release=self._release)
        self._watches: dict[str, Watch] = {}
        self._spent = spent_on(run)
        self._validations: Counter[int] = Counter()
        self._refusals = 0
        self._stopped = self._cancelling = not settings.sends
        self._blocked_until = 0.0
        self._cancels = run.last_cancel()
        self.error: BatchkitError | None = None
        self._doubts = 0

    def go(self) -> None:
        """Until nothing is left that can be done now. Raises what stopped it, when what runs has been collected."""
        self._take_up()
        if self._stopped:
            self._drop_unsent("cancelled before its batch was created")
        while True:
            self._look()
            self._send()
            self._progress.board([_row(watch) for watch in self._watches.values()])
            more = not self._stopped and self._queue.may_grow
            if not self._settings.wait or not (self._watches or more):
                break
            if not self._watches:
                self._progress.update(0, note=self._queue.idle())
            self._sleep(most=SLICE_SECONDS if more else None)
        if self._settings.delete_remote:
            self._delete_leftovers()
        if self.error is not None:
            raise self.error

    # -- what there is to do

    @property
    def busy(self) -> RunBusyError | None:
        """Who holds what this submit could not work on."""
        return self._queue.busy

    def _take_up(self) -> None:
        """Go on with the attempts that an earlier process left."""
        attempts.clean_up_all(self._run)
        for seal in self._seals:
            if any(attempt.at_provider for attempt in self._run.job(seal.shard).attempts) and self._queue.hold(seal):
                attempts.clean_up(self._run, seal.shard)
                for tracked in attempts.take_up(self._run, seal):
                    self._take_up_one(tracked)

    def _take_up_one(self, tracked: Tracked) -> None:
        remote = tracked.remote
        watch = Watch(tracked=tracked)
        here = (tracked.attempt.backend, remote.base_url) == (self._service.name, self._service.base_url)
        if here and (watch.is_created or not self._is_to_be_packed(tracked)):
            self._watches[tracked.name] = watch
        elif watch.is_created:
            self._progress.say(
                f"{tracked.label} is at {tracked.attempt.backend} ({remote.base_url}): this submit leaves it alone"
            )
        else:
            attempts.save(self._run, tracked, "refused", message="withdrawn before its batch was created")

    def _send(self) -> None:
        """Create batches while there is room for more."""
        while self._has_room() and (parcel := self._queue.first()) is not None:
            until = None
            if self._packer is None:
                estimate = self._estimate(parcel.seal, parcel.positions)
            elif (packed := self._pack(self._packer, parcel)) is None:
                continue
            else:
                estimate, until = packed.cost, packed.until
            if not self._has_tokens(estimate) or not self._can_pay(estimate):
                return
            self._queue.remove_first(parcel)
            self._start(parcel, estimate, until)

    def _pack(self, packer: Packer, parcel: Parcel) -> Packed | None:
        """The file of a parcel; None where it holds not all of it: then what it holds is the next parcel."""
        packed = packer.pack(parcel)
        if not packed.rest and not packed.faults:
            return packed
        seal = parcel.seal
        self._queue.remove_first(parcel)
        self._queue.refund(len(parcel.positions))
        self._queue.put_back(seal, packed.rest)
        self._queue.put_back(seal, packed.positions)
        if lost := len(packed.faults):
            record(self._run, seal, packed.faults, backend=self._service.name)
            self._queue.mark_handled(seal.shard, list(packed.faults))
            self._report.responses += lost
            self._report.passing += sum(fault.code == NOT_NOW for fault in packed.faults.values())
            self._progress.update(lost)
            self._progress.say(
                f"shard {seal.shard}: not sent, because of images that cannot be had: {counted(lost, 'request')}"
            )
            self._release()
        return None

    def _is_to_be_packed(self, tracked: Tracked) -> bool:
        """Whether an attempt that is not created needs a file that is not there any more."""
        if self._packer is None:
            return False
        return tracked.attempt.state == "intended" or not self._packer.holds(tracked.remote.signed_until)

    def _start(self, parcel: Parcel, estimate: Cost, until: str | None) -> None:
        remote = Remote(
            base_url=self._service.base_url,
            key_env=self._settings.key_env,
            url=parcel.url,
            input_tokens=estimate.input_tokens,
            usd=estimate.usd,
            host=self._host,
            signed_until=until,
        )
        tracked = attempts.intend(self._run, parcel.seal, parcel.positions, remote, backend=self._service.name)
        self._spent += estimate.usd or 0.0
        self._report.sent += len(parcel.positions)
        self._watches[tracked.name] = Watch(tracked=tracked)
        self._look_at(tracked.name, self._watches[tracked.name])

    # -- room

    def _has_room(self) -> bool:
        if self._stopped or len(self._watches) >= self._settings.max_active:
            return False
        if time.monotonic() < self._blocked_until:
            return False
        # What could not be created yet goes first; and where one create is in doubt, the next one would be, too.
        return all(watch.is_created and not watch.is_in_doubt for watch in self._watches.values())

    def _has_tokens(self, estimate: Cost) -> bool:
        most = self._settings.max_enqueued_tokens
        queued = [watch.tracked.remote.input_tokens or 0 for watch in self._watches.values() if watch.counts]
        return most is None or not queued or sum(queued) + (estimate.input_tokens or 0) <= most

    def _can_pay(self, estimate: Cost) -> bool:
        most = self._settings.max_cost
        if most is None or (estimate.usd is not None and self._spent + estimate.usd <= most):
            return True
        self._stop(
            ServiceError(
                f"what is left would cost more than --max-cost {most:g}: {self._spent:.2f} USD are spent at most",
                hint="raise --max-cost and run the same again",
            )
        )
        return False

    # -- looking

    def _look(self) -> None:
        self._notice_cancel()
        for name, watch in list(self._watches.items()):
            # A look at one may have dropped others.
            if watch.next_look <= time.monotonic() and name in self._watches:
                self._look_at(name, watch)

    def _look_at(self, name: str, watch: Watch) -> None:
        if self._cancelling and watch.tracked.attempt.state == "running" and not watch.cancel_sent:
            self._clerk.cancel(watch)
        event = self._clerk.look(watch, may_create=self._may_create)
        if watch.batch is not None and watch.batch.completed:
            self._clerk.proven = True
        if event is not None:
            if event.kind != "tokens":
                del self._watches[name]
            self._handle(watch, event)
            self._release()

    def _may_create(self) -> bool:
        """Looked at right before each step: an upload takes time, and a cancel may come."""
        return not self._stopped and time.monotonic() >= self._blocked_until and not self._is_cancelled()

    def _is_cancelled(self) -> bool:
        return self._run.last_cancel() != self._cancels

    def _handle(self, watch: Watch, event: Event) -> None:
        tracked = watch.tracked
        if event.kind == "collected":
            self._collected(tracked, event)
        elif event.kind == "tokens":
            self._wait_for_tokens(watch, event)
        elif event.kind == "set-aside":
            self._set_aside(tracked, event)
        elif event.kind == "doubtful":
            self._doubtful(tracked)
        elif event.kind == "trouble":
            self._report.troubled[tracked.name] = event.message
        elif event.too_large and len(tracked.positions) > 1:
            self._shrink(tracked, event)
        elif event.too_large:
            self._fail_alone(tracked, event)
        else:
            self._refused(tracked, event)

    def _refused(self, tracked: Tracked, event: Event) -> None:
        """Nothing of it was run. The others go on, unless the provider takes none of them."""
        self._unsend(tracked)
        error = ServiceError(f"{tracked.label}: refused by the provider: {event.message}", hint=REFUSED_HINT)
        self._refusals += 1
        if self._clerk.proven or self._refusals < MOST_REFUSALS:
            self._progress.say(error.message)
            self.error = self.error or error
        else:
            self._stop(error)

    def _fail_alone(self, tracked: Tracked, event: Event) -> None:
        """A single request that is larger than the provider takes."""
        reasons = {tracked.positions[0]: f"refused by the provider: {event.message}"}
        attempts.fail(self._run, tracked, reasons, code="too_large")
        self._report.responses += 1
        self._progress.say(f"{tracked.label}: a request is too large for the provider: {event.message}")

    def _unsend(self, tracked: Tracked) -> None:
        """It was counted as sent, and nothing of it was run."""
        self._spent -= tracked.remote.usd or 0.0
        self._report.sent = max(0, self._report.sent - len(tracked.positions))
        self._queue.refund(len(tracked.positions))

    def _doubtful(self, tracked: Tracked) -> None:
        self._report.doubtful.append(tracked.name)
        self._doubts += 1
        if self._doubts >= MOST_DOUBTS and not self._clerk.proven:
            self._stop(
                ServiceError(
                    f"{self._doubts} batches in a row could not be created for certain",
                    hint="wait until the provider works again; submit then says how to settle them",
                )
            )

    def _collected(self, tracked: Tracked, event: Event) -> None:
        gathered, batch = event.gathered, event.batch
        assert gathered is not None  # noqa: S101  # the kind says so
        assert batch is not None  # noqa: S101
        self._blocked_until = 0.0
        self._queue.mark_handled(tracked.seal.shard, tracked.positions)
        self._report.responses += gathered.responses
        self._report.passing += gathered.passing
        self._progress.update(len(tracked.positions))
        if self._settings.delete_remote:
            self._clerk.delete_remote(tracked)
        if batch.phase == "cancelled":
            self._progress.say(f"{tracked.label}: the batch was cancelled; submit again sends what it has not run")
        else:
            self._send_again(tracked)

    def _send_again(self, tracked: Tracked) -> None:
        found = outcomes.load(self._run, tracked.seal)
        again = to_retry(found, tracked.positions, attempts=self._settings.attempts)
        if again and not self._stopped:
            self._progress.say(
                f"{tracked.label}: {counted(len(again), 'request')} expired or failed in passing; once more"
            )
        self._queue.put_back(tracked.seal, again)

    def _set_aside(self, tracked: Tracked, event: Event) -> None:
        """The provider found fault with some lines: the others go again, unless it finds fault without end."""
        shard, named = tracked.seal.shard, set(event.named)
        self._unsend(tracked)
        self._report.responses += len(named)
        self._progress.say(f"{tracked.label}: the provider's validation refused {len(named):,}: {event.message}")
        self._validations[shard] += 1
        if self._validations[shard] > self._settings.attempts:
            self.error = self.error or ServiceError(
                f"{tracked.label}: the provider finds fault again and again: {event.message}", hint=REFUSED_HINT
            )
            return
        self._queue.put_back(tracked.seal, [position for position in tracked.positions if position not in named])

    def _wait_for_tokens(self, watch: Watch, event: Event) -> None:
        tracked = watch.tracked
        if self._stopped:
            del self._watches[tracked.name]
            self._unsend(tracked)
            self._clerk.withdraw(tracked, "nothing more was to be sent")
            return
        if self._is_to_be_packed(tracked):
            del self._watches[tracked.name]
            self._progress.say(f"{tracked.label}: the URLs of its images have become too old; they are signed anew")
            self._clerk.withdraw(tracked, "the URLs of its images had become too old")
            self._unsend(tracked)
            self._queue.put_back(tracked.seal, tracked.positions)
            return
        alone = not any(other.counts for other in self._watches.values())
        if alone and watch.token_waits >= TOKEN_WAITS and len(tracked.positions) > 1:
            del self._watches[tracked.name]
            self._progress.say(f"{tracked.label}: too many tokens for the provider's queue; it is cut in two")
            self._clerk.withdraw(tracked, "too many tokens for one batch")
            self._cut_in_two(tracked)
            return
        pause = min(self._settings.pace.tokens * 2 ** (watch.token_waits - 1), 15 * self._settings.pace.tokens)
        self._blocked_until = time.monotonic() + pause
        watch.next_look = self._blocked_until
        self._progress.say(f"{tracked.label}: {event.message} It waits for its turn.")

    def _shrink(self, tracked: Tracked, event: Event) -> None:
        """The file was too large for the provider, whatever it documents: this one and all that follow are halved."""
        if self._packer is not None:
            size = self._packer.shrink()
        else:
            size = self._queue.shrink(tracked.seal, tracked.positions)
        self._progress.say(f"{tracked.label}: {event.message}; files are cut to {size / 1e6:,.1f} MB")
        self._unsend(tracked)
        self._queue.put_back(tracked.seal, tracked.positions)

    def _cut_in_two(self, tracked: Tracked) -> None:
        self._unsend(tracked)
        middle = len(tracked.positions) // 2
        for part in (tracked.positions[middle:], tracked.positions[:middle]):
            self._queue.put_back(tracked.seal, part)

    # -- stopping

    def _stop(self, error: BatchkitError) -> None:
        """Create no more; what is under way is still collected."""
        if self.error is None:
            self.error = error
            if any(watch.counts for watch in self._watches.values()):
                self._progress.say(f"Error: {error.message}; nothing new is sent, what is under way is collected")
        self._stopped = True
        self._drop_unsent("nothing more was to be sent")

    def _notice_cancel(self) -> None:
        if self._is_cancelled():
            self._cancels = self._run.last_cancel()
            self._stopped = self._cancelling = True
            for watch in self._watches.values():
                watch.next_look = 0.0
            self._progress.say("cancelled: nothing new is sent, what is finished is collected")
            self._drop_unsent("cancelled before its batch was created")

    def _drop_unsent(self, why: str) -> None:
        for name, watch in list(self._watches.items()):
            if not watch.is_created:
                del self._watches[name]
                self._unsend(watch.tracked)
                self._clerk.withdraw(watch.tracked, why)
        self._queue.clear()
        self._release()

    def _delete_leftovers(self) -> None:
        """Remove the provider's files of attempts that are over, also those of processes that were killed."""
        for seal in self._seals:
            over = [attempt for attempt in self._run.job(seal.shard).attempts if self._has_files(attempt)]
            if over and self._leases.try_hold(seal.shard):
                for attempt in over:
                    self._clerk.delete_remote(Tracked(seal=seal, attempt=attempt, positions=[]))
        self._release()

    def _has_files(self, attempt: Attempt) -> bool:
        remote = attempt.remote
        return (
            remote is not None
            and not remote.deleted
            and attempt.state in OVER
            and bool(remote.file_id or remote.files)
            and (attempt.backend, remote.base_url) == (self._service.name, self._service.base_url)
        )

    def _release(self) -> None:
        busy = {watch.tracked.seal.shard for watch in self._watches.values()}
        self._leases.release_all_but(busy | self._queue.shards)

    def _sleep(self, most: float | None) -> None:
        """Until the next look is due, a cancel comes, or the wait for tokens is over; `most` seconds where given."""
        moments = [watch.next_look for watch in self._watches.values()]
        if most is not None:
            moments.append(time.monotonic() + most)
        end = min(moments, default=0.0)
        if self._queue.is_open and self._blocked_until > time.monotonic():
            end = min(end, self._blocked_until)
        while (rest := end - time.monotonic()) > 0:
            time.sleep(min(rest, SLICE_SECONDS))
            if self._is_cancelled():
                return


def _row(watch: Watch) -> BoardRow:
    tracked, batch = watch.tracked, watch.batch
    state = batch.state if batch is not None and tracked.attempt.state == "running" else tracked.attempt.state
    return BoardRow(
        name=tracked.name,
        state="waits for tokens" if watch.token_waits and not watch.is_created else state,
        total=len(tracked.positions),
        done=batch.completed if batch is not None else None,
        failed=batch.failed if batch is not None else None,
        tokens=batch.tokens if batch is not None else None,
        seconds=attempts.seconds_since(tracked.attempt.started),
    )
