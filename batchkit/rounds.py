"""What one engine start takes, and what is done with its requests when the engine dies: pure, no files, no clock."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence

import msgspec

Key = tuple[int, int]
"""A request: its shard and its row's position."""

STARTUP_SHARE = 0.05
FIRST_ROUND = 2000
"""Before anything is measured. An 8B model on one large GPU answers that many in a minute or two, about as long as it
takes to start: not much is lost to a kill, and at most one start too many was made."""

MAX_REQUESTS = 200_000
"""Bounds our own memory: the ids of one start are held (about 150 bytes each)."""

MAX_SHARDS = 500
"""Each holds a lease, which is an open file; a process may usually have 1,024."""

BYTES_PER_BYTE = 4
"""Copies of a request that run_batch holds before 0.33: the text, its lines, the parsed body, the decoded image."""

BYTES_PER_PIXEL = 16
"""A decoded pixel (3) and the processor's float32 tensor of it (12): all images of a start wait as that."""

MEMORY_SHARE = 0.4

PROBES = 3


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """As measured in an earlier start with the same arguments."""

    startup_seconds: float
    requests_per_second: float


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """What one start may take."""

    requests: int
    memory: float
    disk: float
    shards: int = MAX_SHARDS


class Weight(msgspec.Struct, frozen=True):
    """What one request of a shard takes, on average."""

    bytes: float
    pixels: float

    @property
    def memory(self) -> float:
        return self.bytes * BYTES_PER_BYTE + self.pixels * BYTES_PER_PIXEL


def plan_room(
    *, due: int, speed: Speed | None, memory: int, disk: int, streams: bool, replicas: int = 1, idle: int = 1
) -> Room:
    """What the next start may take, of `due` requests in all that `idle` of `replicas` engines wait for.

    `memory` and `disk` are the bytes available. An engine that streams takes as much as there is; one that does not
    takes as much as keeps its start-up near 5% of the time: longer rounds save no more, and lose more to a kill.
    """
    share = -(-due // max(idle, 1))
    if streams:
        return Room(requests=min(share, MAX_REQUESTS), memory=float("inf"), disk=disk / 4)
    wanted = FIRST_ROUND
    if speed is not None:
        wanted = round((1 / STARTUP_SHARE - 1) * speed.startup_seconds * speed.requests_per_second)
    wanted = max(1, min(wanted, MAX_REQUESTS))
    # A small rest is not worth a start of its own; and the rounds of a share are made alike.
    starts = max(1, round(share / wanted))
    return Room(
        requests=max(1, min(-(-share // starts), MAX_REQUESTS)), memory=memory * MEMORY_SHARE / replicas, disk=disk / 4
    )


def fitting(room: Room, weight: Weight, taken: int, memory: float, size: float) -> int:
    """How many more requests of `weight` fit into `room`, beside `taken` ones of `memory` and `size` bytes in all.

    At least one where nothing is taken yet: what fits nowhere has to be tried.
    """
    fit = room.requests - taken
    if weight.memory > 0:
        fit = min(fit, int((room.memory - memory) / weight.memory) if room.memory != float("inf") else fit)
    if weight.bytes > 0:
        fit = min(fit, int((room.disk - size) / weight.bytes))
    return max(fit, 0 if taken else 1)


def most_bytes(room: Room) -> float:
    """How large the input of a start may become, where its size is known only when it is written."""
    return min(room.disk, room.memory / BYTES_PER_BYTE)


class Group(msgspec.Struct, kw_only=True):
    """What one start takes. `waiting` is the other half of a group that died; `guilty`: where this half survives,
    what kills the engine is known to be in the other."""

    keys: list[Key]
    waiting: list[Key] = []
    guilty: bool = False

    @property
    def is_divisible(self) -> bool:
        """Whether less of it may be run first: what was cut to find a culprit stays as it is."""
        return not (self.waiting or self.guilty)


class Pool:
    """What is still to be run, and in whose company.

    A group that dies runs again as it is, unless it is certain to die again; if it dies again it is halved until the
    request that kills the engine stands alone. A half whose sibling survived is known to hold it, and is not run whole
    again. A request that died alone, and `attempts` times in all, is condemned.

    As long as nothing was ever answered it may be the engine that is broken: then a single request is tried instead of
    a half, and three different ones that died alone make the engine `broken`.
    """

    def __init__(self, fresh: Callable[[], list[Key]], *, attempts: int, proven: bool) -> None:
        self._fresh = fresh
        self._attempts = attempts
        self._proven = proven
        self._deaths: Counter[Key] = Counter()
        self._trouble: deque[Group] = deque()
        self._loose: list[Key] = []
        self._condemned: list[Key] = []

    def take(self) -> Group | None:
        """The next group: trouble first, so that a broken engine shows at once. None where nothing is left now."""
        if self._trouble:
            return self._trouble.popleft()
        keys, self._loose = self._loose, []
        keys = keys or self._fresh()
        return Group(keys=keys) if keys else None

    def give_back(self, group: Group) -> None:
        """A group that was taken and not run."""
        self._trouble.appendleft(group)

    def put_back(self, keys: Iterable[Key]) -> None:
        """What a start had no room for; nothing is known against it."""
        self._loose[:0] = keys

    def report(self, group: Group, *, rest: Sequence[Key], answers: int, died: bool, certain: bool = False) -> None:
        """What became of a group: the keys without a response, and how many real answers came.

        `certain`: it is known to have died of a request, and would again: nothing is tried twice.
        """
        self._proven = self._proven or answers > 0
        if not died or not rest:
            self._survived(group)
        elif self._attempts > 1 or len(group.keys) == 1:
            self._died(group, list(rest), certain=certain)

    def condemned(self) -> list[tuple[Key, int]]:
        """The requests that are given up since the last call, with their deaths. Held back while the engine itself is
        in doubt."""
        if not self._proven:
            return []
        found, self._condemned = self._condemned, []
        return [(key, self._deaths[key]) for key in found]

    @property
    def broken(self) -> bool:
        """Whether the engine, rather than a request, is what dies."""
        return not self._proven and len(self._condemned) >= PROBES

    @property
    def doubtful(self) -> bool:
        """Whether a request died again and again while nothing was ever answered."""
        return not self._proven and bool(self._condemned)

    @property
    def is_empty(self) -> bool:
        return not (self._trouble or self._loose)

    def shards(self) -> set[int]:
        """The shards that have requests here."""
        groups: Iterable[Key] = (key for group in self._trouble for key in (*group.keys, *group.waiting))
        return {shard for shard, _ in groups} | {shard for shard, _ in self._loose}

    def _survived(self, group: Group) -> None:
        if group.waiting and group.guilty:
            self._halve(group.waiting)
        else:
            self._loose.extend(group.waiting)

    def _died(self, group: Group, rest: list[Key], *, certain: bool) -> None:
        self._deaths.update(rest)
        if len(group.keys) == 1:
            if certain or self._deaths[rest[0]] >= self._attempts:
                self._condemned.append(rest[0])
                self._free(group.waiting)
            else:
                self._trouble.appendleft(group)
            return
        self._free(group.waiting)
        if len(rest) > 1 and (certain or all(self._deaths[key] > 1 for key in rest)):
            self._halve(rest)
        else:
            self._trouble.appendleft(Group(keys=rest))

    def _free(self, waiting: list[Key]) -> None:
        """The half that waited is not known to be guilty any more."""
        if self._proven or not waiting:
            self._loose.extend(waiting)
        else:
            # From far away: neighbours are likely to have the same fault.
            place = (len(waiting) - 1) // len(self._condemned)
            self._trouble.append(Group(keys=[waiting[place]], waiting=waiting[:place] + waiting[place + 1 :]))

    def _halve(self, keys: list[Key]) -> None:
        middle = len(keys) // 2 if self._proven else 1
        if len(keys) == 1:
            self._trouble.appendleft(Group(keys=keys))
        else:
            self._trouble.appendleft(Group(keys=keys[:middle], waiting=keys[middle:], guilty=True))
