"""How many rows of each shard stand how: counted from the responses once, and remembered in `RUN/counts.json`.

A count holds for exactly what it was made from: the seal, the attempts, the versions of the files. `Counts` compares
them each time, and counts anew what has changed; so the file may be lost, or be older than the run, and never lies.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from typing import Self

import msgspec
import xxhash

from batchkit import __version__, outcomes
from batchkit.due import is_due, to_send
from batchkit.errors import BatchkitError
from batchkit.jobs import OVER, Job
from batchkit.manifests import Seal
from batchkit.outcomes import ShardOutcomes
from batchkit.responses import ANSWERS, Verdict
from batchkit.runs import Run
from batchkit.storage import write_whole


class Group(msgspec.Struct, frozen=True, array_like=True):
    """So many `rows` that stand alike, in all that decides whether they are sent again. `shared`: their requests are
    those of other rows."""

    verdict: Verdict
    tries: int
    passing: bool
    in_flight: bool
    reused: bool
    shared: bool
    rows: int


class Tally(msgspec.Struct, frozen=True):
    """The rows of a shard, counted. `groups` are in the order of their first rows.

    All but `verdicts` is about rows with a request of their own, and rejected ones: what is sent and comes back.
    """

    groups: list[Group]

    def verdicts(self) -> dict[str, int]:
        """Those that are there, in the order of their first rows."""
        found: Counter[str] = Counter()
        for group in self.groups:
            found[group.verdict.value] += group.rows
        return dict(found)

    @property
    def _own(self) -> Iterator[Group]:
        return (group for group in self.groups if not group.shared)

    @property
    def own(self) -> int:
        return sum(group.rows for group in self._own)

    @property
    def answered(self) -> int:
        return sum(group.rows for group in self._own if group.verdict in ANSWERS)

    @property
    def flying(self) -> int:
        """Rows without an answer that others have, or may have."""
        return sum(group.rows for group in self._own if group.in_flight and group.verdict not in ANSWERS)

    @property
    def reused(self) -> int:
        return sum(group.rows for group in self._own if group.reused)

    def due(self, *, attempts: int, retry: frozenset[Verdict] = frozenset()) -> int:
        """How many `submit` has to send, as `due.to_send`; nothing here knows whether an answer is invalid."""
        return sum(group.rows for group in self._own if is_due(group, attempts, retry))


def tally(shard: ShardOutcomes) -> Tally:
    found = Counter(
        (
            outcome.verdict,
            outcome.tries,
            outcome.passing,
            outcome.in_flight,
            outcome.reused_from is not None,
            outcome.same_as is not None,
        )
        for outcome in shard.outcomes
    )
    return Tally([Group(*kind, rows) for kind, rows in found.items()])


def _untouched(seal: Seal) -> Tally:
    """Of a shard without attempts and responses."""
    groups = (
        Group(Verdict.PENDING, 0, False, False, False, False, seal.requests),
        Group(Verdict.PENDING, 0, False, False, False, True, len(seal.firsts)),
        Group(Verdict.REJECTED, 0, False, False, False, False, len(seal.rejected)),
    )
    return Tally([group for group in groups if group.rows])


class _Count(msgspec.Struct, frozen=True, array_like=True):
    """`of` is a checksum of all that was counted."""

    of: str
    tally: Tally


class Counts:
    """The counts of a run as it is when this is made. What is counted anew is written at the end of the block."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._files = run.responses_versions()
        self._known = _read(run)
        self._new: dict[int, tuple[Seal, _Count]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._save()

    def of(self, seal: Seal, job: Job | None = None) -> Tally:
        """The shard's counts; `job` is the shard's as it was just read. Raises `RunError` where its files are
        damaged."""
        job = job or self._run.job(seal.shard)
        if not job.attempts and not self._files.get(seal.shard):
            return _untouched(seal)
        mark = self._mark(seal, job, self._files)
        count = self._known.get(seal.shard)
        if count is None or count.of != mark:
            count = _Count(mark, tally(outcomes.load(self._run, seal)))
            self._known[seal.shard] = count
            self._new[seal.shard] = seal, count
        return count.tally

    def look(
        self, seal: Seal, *, attempts: int, retry: frozenset[Verdict], only: Container[int] | None = None
    ) -> tuple[Tally, int]:
        """The shard's counts, and how many of its rows are to be sent. Its responses are read where counts cannot say
        that: where it depends on the rows themselves, or on their answers."""
        if _suffice(retry, only):
            found = self.of(seal)
            return found, found.due(attempts=attempts, retry=retry)
        loaded = outcomes.load(self._run, seal)
        return tally(loaded), len(to_send(loaded, attempts=attempts, retry=retry, only=only))

    def is_done(
        self, seal: Seal, *, attempts: int, retry: frozenset[Verdict], only: Container[int] | None = None
    ) -> bool:
        """Whether it is known by now, without reading the responses, that its attempts are over, and that nothing is
        to be sent."""
        job, count = self._run.job(seal.shard), self._known.get(seal.shard)
        if count is None or not _suffice(retry, only) or any(attempt.state not in OVER for attempt in job.attempts):
            return False
        return count.of == self._mark(seal, job, self._files) and not count.tally.due(attempts=attempts, retry=retry)

    def _mark(self, seal: Seal, job: Job, files: dict[int, list[str]]) -> str:
        """Other verdicts of another version are not to be believed either."""
        ids = self._run.version_of(self._run.ids_path(seal.shard))
        parts = (__version__, seal, job.attempts, ids, files.get(seal.shard, []))
        return xxhash.xxh3_128_hexdigest(msgspec.json.encode(parts))

    def _save(self) -> None:
        """Write what is new; but nothing of a shard that has changed while it was read."""
        if not self._new:
            return
        files = self._run.responses_versions()
        counts = _read(self._run)  # others may have written since
        for shard, (seal, count) in self._new.items():
            if self._mark(seal, self._run.job(shard), files) == count.of:
                counts[shard] = count
        self._new = {}
        with contextlib.suppress(BatchkitError), write_whole(self._run.counts_path) as stream:
            stream.write(msgspec.json.encode(counts))


def count(run: Run, seals: Iterable[Seal]) -> None:
    """Have the counts of these shards known."""
    with Counts(run) as counts:
        for seal in seals:
            counts.of(seal)


def _suffice(retry: frozenset[Verdict], only: Container[int] | None) -> bool:
    return only is None and Verdict.INVALID not in retry


def _read(run: Run) -> dict[int, _Count]:
    with contextlib.suppress(OSError, UnicodeDecodeError, msgspec.DecodeError):
        return msgspec.json.decode(run.counts_path.read_bytes(), type=dict[int, _Count])
    return {}
