"""What `submit` has to do: the requests that are due, shard by shard, taken under leases."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Self

import msgspec

from batchkit import outcomes
from batchkit.backends.vllm import End
from batchkit.counts import Counts, Tally
from batchkit.due import to_send
from batchkit.errors import RunBusyError, StorageError
from batchkit.manifests import Seal
from batchkit.responses import Verdict
from batchkit.rounds import Key, Room, Speed, Weight, fitting
from batchkit.runs import Run
from batchkit.storage import write_whole

MEASURABLE = 20
"""With fewer requests a start says nothing about the engine's speed."""


class Leases:
    """The shards that this process works on. Released all at the end of the block.

    `leave` is called with each shard right before it is released.
    """

    def __init__(self, run: Run, leave: Callable[[int], None] = lambda shard: None) -> None:  # noqa: ARG005
        self._run = run
        self._leave = leave
        self._held: dict[int, contextlib.ExitStack] = {}

    def hold(self, shard: int) -> None:
        """Raises `RunBusyError` where another process holds it."""
        if shard not in self._held:
            stack = contextlib.ExitStack()
            stack.enter_context(self._run.lease(f"{shard:05d}"))
            self._held[shard] = stack

    def try_hold(self, shard: int) -> bool:
        """Whether it is ours now."""
        with contextlib.suppress(RunBusyError):
            self.hold(shard)
            return True
        return False

    def release_all_but(self, shards: Iterable[int]) -> None:
        for shard in self._held.keys() - set(shards):
            self.release(shard)

    def release(self, shard: int) -> None:
        with self._held.pop(shard):
            self._leave(shard)
        self._run.leave_requests(shard)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release_all_but(())


class Scan:
    """What the chosen shards hold before anything is sent: requests that are `due`, `unanswered`, or `in_flight` at a
    batch service, and whether any engine ever `answered`."""

    def __init__(
        self,
        run: Run,
        seals: Sequence[Seal],
        *,
        attempts: int,
        retry: frozenset[Verdict],
        only: frozenset[int] | None = None,
    ) -> None:
        self.due = self.unanswered = self.in_flight = 0
        self.answered = False
        self.shards: list[Seal] = []
        size = pixels = requests = 0
        for seal, found, due in self._look(run, seals, attempts, retry, only):
            self.unanswered += len(seal.rejected)
            if found is not None:
                self.answered = self.answered or found.answered > found.reused
                self.in_flight += found.flying
                self.unanswered += max(0, seal.requests - found.answered - due - found.flying)
            if due:
                self.due += due
                self.shards.append(seal)
                size, pixels, requests = size + seal.requests_bytes, pixels + seal.pixels, requests + seal.requests
                size += seal.links.inlined if seal.links is not None else 0
        self.weight = Weight(size / max(requests, 1), pixels / max(requests, 1))

    @staticmethod
    def _look(
        run: Run, seals: Sequence[Seal], attempts: int, retry: frozenset[Verdict], only: frozenset[int] | None
    ) -> Iterator[tuple[Seal, Tally | None, int]]:
        """Each shard with its counts, None where it was never sent, and how many of its requests are due."""
        with Counts(run) as counts:
            for seal in seals:
                if only is None and not run.job_path(seal.shard).exists():
                    yield seal, None, seal.requests
                else:
                    yield seal, *counts.look(seal, attempts=attempts, retry=retry, only=only)


class Work:
    """The requests that are due, handed out in order, each once."""

    def __init__(
        self,
        run: Run,
        scan: Scan,
        leases: Leases,
        *,
        limit: int | None,
        attempts: int,
        retry: frozenset[Verdict],
        only: frozenset[int] | None = None,
    ) -> None:
        self._only = only
        self._run = run
        self._leases = leases
        self._attempts = attempts
        self._retry = retry
        self._shards = list(reversed(scan.shards))
        self._weight = scan.weight
        self._rest: list[Key] = []
        self._left = None if limit is None else max(0, limit - scan.due)
        self.due = scan.due if limit is None else min(limit, scan.due)
        self.busy: RunBusyError | None = None

    @property
    def is_limited(self) -> bool:
        """Whether shards that are added change nothing: `limit` is reached."""
        return self._left == 0

    def add(self, seals: Sequence[Seal]) -> Scan:
        """More shards, behind the others. Returns what they hold."""
        scan = Scan(self._run, seals, attempts=self._attempts, retry=self._retry, only=self._only)
        self._shards[:0] = reversed(scan.shards)
        due = scan.due if self._left is None else min(scan.due, self._left)
        self._left = None if self._left is None else self._left - due
        self.due += due
        heavier = max(self._weight.bytes, scan.weight.bytes), max(self._weight.pixels, scan.weight.pixels)
        self._weight = Weight(*heavier)
        return scan

    def take(self, room: Room) -> list[Key]:
        """As much as fits into `room`, in order; holds the leases of its shards."""
        keys: list[Key] = []
        shards = 0
        while self.due and shards < room.shards and (self._rest or self._open_next()):
            taken = len(keys)
            fit = fitting(room, self._weight, taken, taken * self._weight.memory, taken * self._weight.bytes)
            if fit <= 0:
                break
            fit = min(fit, self.due)
            part, self._rest = self._rest[:fit], self._rest[fit:]
            keys += part
            self.due -= len(part)
            shards += 1
        return keys

    @property
    def is_empty(self) -> bool:
        return not (self.due and (self._rest or self._shards))

    def shards(self) -> set[int]:
        """The shard that is taken in part."""
        return {self._rest[0][0]} if self._rest and self.due else set()

    def _open_next(self) -> bool:
        while self._shards:
            seal = self._shards.pop()
            try:
                self._leases.hold(seal.shard)
            except RunBusyError as exc:
                self.busy = exc
                continue
            # Looked at again: another process may have worked on it before we held its lease.
            found = outcomes.load(self._run, seal)
            due = to_send(found, attempts=self._attempts, retry=self._retry, only=self._only)
            self._rest = [(seal.shard, position) for position in due]
            if self._rest:
                return True
            self._leases.release(seal.shard)
        return False


class SpeedFile:
    """What `engine/speed.json` remembers of the engine's speed, for the next submit. Other arguments, other speed."""

    def __init__(self, run: Run, args: Sequence[str]) -> None:
        self._path = run.path / "engine" / "speed.json"
        self._args = list(args)
        self.known: Speed | None = None
        with contextlib.suppress(OSError, msgspec.DecodeError):
            kept = msgspec.json.decode(self._path.read_bytes(), type=_Kept)
            self.known = kept.speed if kept.args == self._args else None

    def measure(self, end: End, requests: int) -> None:
        """Take in a start that went well."""
        if end.startup_seconds is None or requests < MEASURABLE:
            return
        working = max(end.seconds - end.startup_seconds, 0.1)
        self.known = Speed(startup_seconds=end.startup_seconds, requests_per_second=requests / working)
        with contextlib.suppress(StorageError), write_whole(self._path) as stream:  # it only saves time
            stream.write(msgspec.json.encode(_Kept(args=self._args, speed=self.known)))


class _Kept(msgspec.Struct, frozen=True):
    args: list[str]
    speed: Speed
