"""What other runs have answered: from a request to the answer that it had there.

The index is a temporary file, so that memory stays flat however much was answered; the answers stay where they are.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from batchkit import elsewhere, outcomes
from batchkit.answers import ParseError, parser
from batchkit.conversion import Converted
from batchkit.errors import RunError, StorageError, UsageError
from batchkit.manifests import Seal, as_ranges
from batchkit.outcomes import Outcome
from batchkit.progress import Progress
from batchkit.requests import fingerprint
from batchkit.responses import ANSWERS, UnreadableLine, Verdict, parse
from batchkit.runs import Run
from batchkit.shardfiles import request_lines
from batchkit.storage import is_remote, open_read
from batchkit.takeovers import Answer, checksum

_OURS = re.compile(r"\d+-([0-9a-f]{16})")
_TABLE = """
CREATE TABLE answers (
    request BLOB, row TEXT, run INTEGER, shard INTEGER, attempt INTEGER, backend TEXT,
    offset INTEGER, length INTEGER, checksum INTEGER, PRIMARY KEY (request, row)
) WITHOUT ROWID
"""


class _Place(NamedTuple):
    attempt: int
    backend: str
    offset: int
    length: int
    checksum: int


def named(runs: Sequence[str]) -> list[str]:
    """The runs of `--reuse` as the manifest keeps them: absolute, each once."""
    return list(
        dict.fromkeys(run.rstrip("/") if is_remote(run) else str(Path(run).expanduser().resolve()) for run in runs)
    )


def open_known(name: str, into: str | Path) -> Run:
    """Open a run to reuse. Raises `RunError` where it is none, `UsageError` where it is the run `into` itself."""
    if named([str(into)]) == [name.rstrip("/")]:
        raise UsageError(f"--reuse {name}: is the run itself", hint="name another run, or leave --reuse out")
    if not Run.exists(name):
        raise RunError(
            f"--reuse {name}: not a run directory (it has no manifest.json)",
            hint="check the path; a preparation that was begun with it needs it until it is finished",
        )
    return Run.open(name)


class KnownAnswers:
    """The answers of `runs`, the first named first. Of several answers in one run that to the same row counts, else the
    first. With `schema`, what is answered and does not match it is no answer.

    Raises `RunError` where one of the runs is none or damaged, `StorageError` where there is no room for the index.
    """

    def __init__(
        self,
        runs: Sequence[str],
        progress: Progress,
        *,
        into: str | Path = "",
        schema: dict[str, Any] | None = None,
    ) -> None:
        self._parse = parser("json", schema) if schema is not None else None
        self._names = list(runs)
        self._runs = [open_known(name, into) if into else Run.open(name) for name in self._names]
        # An empty name is a temporary file of SQLite's own, which is gone with the process, however that ends.
        self._index = sqlite3.connect("", isolation_level=None)
        # What a crash leaves of it is worthless: no journal, no fsync.
        self._index.execute("PRAGMA journal_mode = OFF")
        self._index.execute("PRAGMA synchronous = OFF")
        self._index.execute(_TABLE)
        try:
            for number, run in enumerate(self._runs):
                self._read(number, run, progress)
        except sqlite3.OperationalError as exc:
            self._index.close()
            raise _no_room(exc) from exc
        except BaseException:
            self._index.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._index.close()

    def find(self, done: Converted) -> Answer | None:
        """The answer that a request had in one of the runs."""
        if done.fingerprint is None or not self._runs:
            return None
        try:
            found = self._index.execute(
                "SELECT run, shard, attempt, backend, offset, length, checksum FROM answers "
                "WHERE request = ? AND row IN (?, '') ORDER BY row DESC LIMIT 1",
                (done.fingerprint, _row(done.custom_id)),
            ).fetchone()
        except sqlite3.OperationalError as exc:
            raise _no_room(exc) from exc
        if found is None:
            return None
        number, shard, attempt, backend, *place = found
        path = self._runs[number].responses_path(shard, attempt)
        return Answer(self._names[number], backend, path, *place)

    def _read(self, number: int, run: Run, progress: Progress) -> None:
        requests = answers = lost = unfit = 0
        _gather(run, progress)
        for seal in run.seals():
            requests += seal.requests
            answered = _answered(outcomes.load(run, seal))
            found = {name: outcome for name, outcome in answered.items() if self._fits(outcome)}
            unfit += len(answered) - len(found)
            if found and run.bytes_of(run.requests_path(seal.shard)) is None:
                lost += 1
                continue
            answers += self._add(number, run, seal, found)
        text = f"{self._names[number]}: {answers:,} of {requests:,} requests have an answer"
        if lost:
            text += f"; {lost:,} answered shards have no requests any more, and are of no use"
        if unfit:
            text += f"; {unfit:,} more do not match the response schema, and are not taken over"
        progress.say(text + ("" if run.prepared() is not None else "; its prepare has not finished"))

    def _fits(self, outcome: Outcome) -> bool:
        """Whether an answer is one here, too: it may have been asked for in a run that did not check it."""
        if self._parse is None or outcome.verdict is not Verdict.ANSWERED or outcome.response is None:
            return True
        try:
            self._parse(outcome.response.answer)
        except ParseError:
            return False
        return True

    def _add(self, number: int, run: Run, seal: Seal, answered: Mapping[str, Outcome]) -> int:
        """Take in one shard; how many answers it has."""
        places = _places(run, seal, answered)
        ids = run.read_ids(seal) if places else []
        indices = [position - seal.start for position in seal.asking if places and ids[position - seal.start] in places]
        lines = request_lines(run, seal, as_ranges(seal.start + index for index in indices)) if indices else ()
        self._index.execute("BEGIN")
        for index, line in zip(indices, lines, strict=True):
            self._insert(fingerprint(line), _row(ids[index]), (number, seal.shard, *places[ids[index]]))
        self._index.execute("COMMIT")
        return len(indices)

    def _insert(self, request: bytes, row: str, place: tuple[int | str, ...]) -> None:
        """The first answer to a request is for every row; a later one of the same run for the same row alone."""
        insert = "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
        if self._index.execute(insert, (request, "", *place)).rowcount:
            return
        select = "SELECT run FROM answers WHERE request = ? AND row = ''"
        if self._index.execute(select, (request,)).fetchone() == (place[0],):
            self._index.execute(insert, (request, row, *place))


def _gather(run: Run, progress: Progress) -> None:
    """Collect what machines elsewhere have answered; a run that may only be read is taken as it is."""
    try:
        gathered = elsewhere.gather(run, {seal.shard: seal for seal in run.seals()}, close=False)
    except StorageError as exc:
        progress.say(f"{run.name}: what came from machines elsewhere is not collected: {exc.message}")
        return
    if text := str(gathered):
        progress.say(f"{run.name}: {text}")
    if gathered.busy is not None:
        progress.say(f"{gathered.busy.message}: what came for it from elsewhere is not collected")


def _row(custom_id: str) -> str:
    """What two runs call the same row: the digest of its identity, without its position."""
    ours = _OURS.fullmatch(custom_id)
    return ours[1] if ours else custom_id


def _answered(shard: outcomes.ShardOutcomes) -> dict[str, Outcome]:
    return {outcome.custom_id: outcome for outcome in shard.own if outcome.verdict in ANSWERS}


def _places(run: Run, seal: Seal, answered: Mapping[str, Outcome]) -> dict[str, _Place]:
    """Where the answers that count are, by custom_id."""
    places: dict[str, _Place] = {}
    attempts = {outcome.attempt for outcome in answered.values()}
    for attempt, path in run.responses_paths(seal.shard):
        if attempt in attempts:
            for offset, line in _lines(path):
                try:
                    response = parse(line)
                except UnreadableLine:
                    continue
                outcome = answered.get(response.custom_id)
                # Equal answers within an attempt are one; of different ones the row is conflicting, and not here.
                if outcome is not None and outcome.attempt == attempt and response.verdict is outcome.verdict:
                    place = _Place(attempt, outcome.backend or run.manifest.backend, offset, len(line), checksum(line))
                    places.setdefault(response.custom_id, place)
    return places


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with open_read(str(path)) as stream:
        offset = 0
        for line in stream:
            if line.strip():
                yield offset, line.removesuffix(b"\n")
            offset += len(line)


def _no_room(exc: sqlite3.OperationalError) -> StorageError:
    return StorageError(
        f"the temporary index of answers cannot be written: {exc}",
        hint="free some disk space where temporary files go (SQLITE_TMPDIR or TMPDIR names another place)",
    )
