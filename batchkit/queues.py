"""What one `submit` has still to hand over: shard by shard, under leases, in parcels of what one batch takes."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from batchkit import outcomes, parcels
from batchkit.counts import Counts
from batchkit.due import to_send
from batchkit.errors import RunBusyError
from batchkit.feeds import Feed
from batchkit.handover import Settings
from batchkit.limits import Limits
from batchkit.manifests import Seal
from batchkit.parcels import Parcel
from batchkit.runs import Run
from batchkit.work import Leases


class Queue:
    """Shards are opened when their turn comes, so that only those hold leases that are worked on.

    `release` is called when a shard turned out to have nothing to do. `busy` is what another process holds.
    """

    def __init__(
        self,
        run: Run,
        feed: Feed,
        *,
        limits: Limits,
        settings: Settings,
        leases: Leases,
        release: Callable[[], None],
    ) -> None:
        self._run = run
        # Shards that the provider refused the last time go last: they must not hold up the others.
        self._feed = feed
        self._closed = deque(sorted(feed.chosen, key=lambda seal: _was_refused(run, seal)))
        self._counts = Counts(run)
        self._limits = limits
        self._settings = settings
        self._leases = leases
        self._release = release
        self._parcels: deque[Parcel] = deque()
        self._handled: dict[int, set[int]] = {}
        self._left = settings.limit
        self.busy: RunBusyError | None = None

    @property
    def is_open(self) -> bool:
        """Whether parcels wait whose shards are held."""
        return bool(self._parcels)

    @property
    def may_grow(self) -> bool:
        """Whether shards may come that are not there yet, and are wanted."""
        return self._left != 0 and self._feed.is_open

    def idle(self) -> str:
        """Nothing is under way, and nothing is there to hand over. Returns what is waited for."""
        self._feed.idle()
        return self._feed.stage

    @property
    def shards(self) -> set[int]:
        return {parcel.seal.shard for parcel in self._parcels}

    def hold(self, seal: Seal) -> bool:
        """Whether the shard is ours now; one that is not is left out from here on."""
        try:
            self._leases.hold(seal.shard)
        except RunBusyError as exc:
            self.busy = exc
            if seal in self._closed:
                self._closed.remove(seal)
            return False
        return True

    def first(self) -> Parcel | None:
        """The next parcel; it stays in the queue."""
        if self._left == 0:
            return None
        self._closed.extend(self._feed.take())
        while not self._parcels and self._closed:
            self._open(self._closed.popleft())
        if not self._parcels:
            return None
        parcel = self._parcels[0]
        if self._left is not None and len(parcel.positions) > self._left:
            return msgspec.structs.replace(parcel, positions=parcel.positions[: self._left])
        return parcel

    def _open(self, seal: Seal) -> None:
        wanted = self._settings
        if self._counts.is_done(seal, attempts=wanted.attempts, retry=wanted.retry, only=wanted.only):
            self._feed.pass_by(seal.shard)
            return
        if not self.hold(seal):
            return
        found = outcomes.load(self._run, seal)
        due = to_send(found, attempts=wanted.attempts, retry=wanted.retry, only=wanted.only)
        handled = self._handled.get(seal.shard, set())
        self._parcels.extend(parcels.cut(self._run, seal, [row for row in due if row not in handled], self._limits))
        if not self._parcels:
            self._release()

    def remove_first(self, parcel: Parcel) -> None:
        """`parcel` is what `first` gave."""
        self._parcels.popleft()
        if self._left is not None:
            self._left -= len(parcel.positions)

    def refund(self, requests: int) -> None:
        """So many were taken and not sent."""
        if self._left is not None:
            self._left += requests

    def put_back(self, seal: Seal, positions: Sequence[int]) -> None:
        """These requests go next."""
        self._parcels.extendleft(reversed(parcels.cut(self._run, seal, positions, self._limits)))

    def mark_handled(self, shard: int, positions: Sequence[int]) -> None:
        """These came back in this submit: whether they go again is decided, and not once more."""
        self._handled.setdefault(shard, set()).update(positions)

    def shrink(self, seal: Seal, positions: Sequence[int]) -> int:
        """A file of these was too large: cut all parcels to half of its size. Returns that, in bytes."""
        size = sum(parcel.size for parcel in parcels.cut(self._run, seal, positions, self._limits))
        self._limits = dataclasses.replace(self._limits, max_bytes=max(1, size // 2))
        waiting, self._parcels = self._parcels, deque()
        for parcel in waiting:
            self._parcels.extend(parcels.cut(self._run, parcel.seal, parcel.positions, self._limits))
        return self._limits.max_bytes

    def clear(self) -> None:
        self._parcels.clear()
        self._closed.clear()


def _was_refused(run: Run, seal: Seal) -> bool:
    if not run.job_path(seal.shard).exists():
        return False
    attempts = run.job(seal.shard).attempts
    return bool(attempts) and attempts[-1].state == "refused"
