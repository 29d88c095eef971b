"""Join one shard: its rows, its attempts and its response lines → what became of each row.

`merge` writes this down; `submit` and `status` decide by it (`due`). Memory is that of one shard.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import xxhash
from msgspec import structs

from batchkit.errors import RunError
from batchkit.jobs import OVER, TRIED, Attempt
from batchkit.manifests import PREPARE_AGAIN, Rejection, Seal
from batchkit.responses import ANSWERS, Keep, Response, UnreadableLine, Verdict, choose, parse
from batchkit.runs import Run
from batchkit.sections import Section
from batchkit.storage import open_read

_decode_ids = msgspec.json.Decoder(str).decode_lines


class Outcome(msgspec.Struct, kw_only=True, gc=False):
    """What became of one row.

    `attempt` and `backend` are those of `response`; without one, of the last attempt that took the row. `message` is
    None where there is an answer and nothing to say of it; `code` is that of the error or the rejection. `tries`
    counts the attempts that took the row, are over (died ones too), and did not answer it. `in_flight`: a batch
    service, or a machine elsewhere, has the row, or may have. `reused_from` is the run that `response` was taken over
    from. `same_as` is the custom_id of the row whose request was sent for this one, too: all else is as of that row.
    """

    custom_id: str
    verdict: Verdict
    response: Response | None = None
    attempt: int | None = None
    backend: str | None = None
    conflicts: list[Response] = []
    message: str | None = None
    code: str | int | None = None
    tries: int = 0
    in_flight: bool = False
    reused_from: str | None = None
    same_as: str | None = None

    @property
    def is_paid_here(self) -> bool:
        """Whether `response` is that of a request which this run has sent for this very row."""
        return self.reused_from is None and self.same_as is None

    @property
    def passing(self) -> bool:
        """Whether it is a failure that the same request may be spared the next time."""
        return self.response is not None and self.response.passing


class ShardOutcomes(msgspec.Struct, kw_only=True):
    """One outcome per row: `outcomes[i]` and `ids[i]` are those of position `seal.start + i`.

    `superseded` are responses of attempts that another one has taken the place of, each with its backend; what was
    taken over from another run is not among them: it cost nothing here.
    `unexpected` are whole lines that belong to no request of the shard, `unreadable` ones that are no responses (torn,
    not JSON, no custom_id). `schema` is what the run's answers must match, None where anything goes.
    """

    seal: Seal
    ids: list[str]
    outcomes: list[Outcome]
    unexpected: list[bytes]
    unreadable: list[bytes]
    superseded: list[tuple[str | None, Response]] = []
    schema: dict[str, Any] | None = None

    @property
    def own(self) -> list[Outcome]:
        """The outcomes of rows that have a request of their own, and of rejected ones."""
        return [outcome for outcome in self.outcomes if outcome.same_as is None]


class ShardFiles(NamedTuple):
    """All that it takes to join a shard, wherever that is done: nothing of it needs the run. `responses` are in the
    order of the attempts, each with its number.

    `unanswered` is there for a pile, which counts as one attempt of which nothing else is known: it is said of rows
    without a response. The ids of a pile are anybody's, so each line of theirs is JSON; its rows may lie in the user's
    own file.
    """

    seal: Seal
    rows: Section
    ids: Path
    responses: list[tuple[int, Section]]
    attempts: list[Attempt]
    unanswered: str | None = None


def files_of(run: Run, seal: Seal) -> ShardFiles:
    """The files of a shard, here."""
    return ShardFiles(
        seal,
        Section(run.fetch(run.rows_path(seal.shard))),
        run.fetch(run.ids_path(seal.shard)),
        [(number, Section(path)) for number, path in run.responses_paths(seal.shard)],
        run.job(seal.shard).attempts,
    )


Candidates = list[tuple[int, Response]]
"""The responses to one request, each with the number of its attempt, in the order of the files."""


class Judge:
    """Says what became of the rows of one shard. `index_of` has the ids of those that were sent; `firsts` are, of rows
    that share a request, the rows that it is of."""

    def __init__(self, files: ShardFiles, ids: list[str]) -> None:
        self.ids = ids
        self.attempts = {attempt.number: attempt for attempt in files.attempts}
        self.rejections = {rejection.position - files.seal.start: rejection for rejection in files.seal.rejected}
        start = files.seal.start
        self.firsts = {position - start: first - start for position, first in files.seal.firsts.items()}
        # A rejected row may bear the id of the row that it repeats: responses belong to the row that was sent.
        self.index_of = {custom_id: index for index, custom_id in enumerate(ids)}
        if self.rejections or self.firsts:
            self.index_of = {ids[position - start]: position - start for position in files.seal.asking}
        self._seal = files.seal
        self._unanswered = files.unanswered
        self._tried: tuple[list[int], list[int]] | None = None

    def still_written(self, attempt: int) -> bool:
        """Whether half of a line may be one that is being written."""
        return attempt not in self.attempts or self.attempts[attempt].state not in OVER

    def outcome(self, index: int, candidates: Candidates) -> Outcome:
        if index in self.rejections:
            return _rejected(self.rejections[index])
        if self._tried is None:
            self._tried = _attempts_of_rows(list(self.attempts.values()), self._seal)
        last, over = self._tried
        if not candidates and self._unanswered is not None:
            return Outcome(custom_id=self.ids[index], verdict=Verdict.MISSING, message=self._unanswered)
        return _outcome(self.ids[index], candidates, self.attempts.get(last[index]), self.attempts, over[index])

    def shared(self, index: int, sent: Outcome) -> Outcome:
        """That of a row whose request is that of the row with the outcome `sent`."""
        return structs.replace(sent, custom_id=self.ids[index], same_as=sent.custom_id)

    def superseded(self, candidates: Candidates, outcome: Outcome) -> Iterator[tuple[str | None, Response]]:
        """One for each earlier attempt that has responded; a line that is there twice was paid for once."""
        if len(candidates) > 1:
            for number, response in dict(candidates).items():
                attempt = self.attempts.get(number)
                if number != outcome.attempt and (attempt is None or attempt.reused_from is None):
                    yield attempt.backend if attempt is not None else None, response


def load(run: Run, seal: Seal, keep: Keep | None = None) -> ShardOutcomes:
    """Read what is known of a shard now; `keep` as for `responses.parse`. Raises `RunError` where its files are
    damaged."""
    files = files_of(run, seal)
    ids = read_ids(files)
    shard = ShardOutcomes(
        seal=seal, ids=ids, outcomes=[], unexpected=[], unreadable=[], schema=run.manifest.response_schema
    )
    judge = Judge(files, ids)
    for index, candidates in enumerate(_read_responses(files, shard, judge, keep)):
        if (first := judge.firsts.get(index)) is not None:  # an earlier row
            shard.outcomes.append(judge.shared(index, shard.outcomes[first]))
            continue
        outcome = judge.outcome(index, candidates or [])
        shard.outcomes.append(outcome)
        shard.superseded += judge.superseded(candidates or [], outcome)
    return shard


def read_ids(files: ShardFiles) -> list[str]:
    """The custom_ids of the shard's rows, in their order. Raises `RunError` where they are not what prepare wrote."""
    path, seal = files.ids, files.seal
    try:
        written = path.read_bytes()
    except OSError as exc:
        raise damaged(path, f"cannot be read: {exc.strerror or exc}") from exc
    if xxhash.xxh3_128_hexdigest(written) != seal.ids_checksum:
        raise damaged(path, "is not what prepare wrote (its checksum differs)")
    if files.unanswered is not None:
        ids = _decode_ids(written)
    else:
        ids = written.decode("utf-8").removesuffix("\n").split("\n") if written else []
    if len(ids) != seal.end - seal.start:
        raise damaged(path, f"has {len(ids)} ids for {seal.end - seal.start} rows")
    return ids


def damaged(path: Path, what: str) -> RunError:
    return RunError(f"{path}: {what}", hint=f"rm {shlex.quote(str(path))}, and {PREPARE_AGAIN}")


def _read_responses(
    files: ShardFiles, shard: ShardOutcomes, judge: Judge, keep: Keep | None
) -> list[Candidates | None]:
    """For each row its candidates; lines of no row go into `shard`."""
    candidates: list[Candidates | None] = [None] * len(shard.ids)
    for number, section in files.responses:
        for line in _lines(section.path):
            try:
                response = parse(line, keep)
            except UnreadableLine:
                if line.endswith(b"\n") or not judge.still_written(number):
                    shard.unreadable.append(line.removesuffix(b"\n"))
                continue
            index = judge.index_of.get(response.custom_id)
            if index is None:
                shard.unexpected.append(line.removesuffix(b"\n"))
            elif (found := candidates[index]) is None:
                candidates[index] = [(number, response)]
            else:
                found.append((number, response))
    return candidates


def _lines(path: Path) -> Iterator[bytes]:
    """Lines that are not blank, with their line feed."""
    with open_read(str(path)) as stream:
        for line in stream:
            if line.strip():
                yield line


def _attempts_of_rows(attempts: list[Attempt], seal: Seal) -> tuple[list[int], list[int]]:
    """For each row: the number of the last attempt that took it (0: none), and how many that took it are over."""
    last = [0] * (seal.end - seal.start)
    over = [0] * (seal.end - seal.start)
    for attempt in sorted(attempts, key=lambda attempt: attempt.number):
        for start, end in attempt.rows:
            for index in range(max(start, seal.start) - seal.start, min(end, seal.end) - seal.start):
                if attempt.state == "refused" and last[index]:
                    continue  # nothing of it was run: what an earlier attempt has said stands
                last[index] = attempt.number
                over[index] += attempt.state in TRIED
    return last, over


def _rejected(rejection: Rejection) -> Outcome:
    return Outcome(
        custom_id=rejection.custom_id, verdict=Verdict.REJECTED, message=rejection.message, code=rejection.code
    )


def _outcome(
    custom_id: str,
    candidates: Candidates,
    last: Attempt | None,
    attempts: dict[int, Attempt],
    over: int,
) -> Outcome:
    chosen = choose(candidates)
    response, number = chosen.response, chosen.attempt
    if response is not None and number is not None and response.verdict in ANSWERS:
        answered_in = {attempt for attempt, found in candidates if found.verdict in ANSWERS and attempt in attempts}
        tries = over and max(0, over - sum(attempts[attempt].state in TRIED for attempt in answered_in))
        verdict = Verdict.CONFLICTING if chosen.conflicts else response.verdict
        message = conflict_message(chosen.conflicts) if chosen.conflicts else response.message
    elif response is not None and number is not None and _counts(response, number, last):
        verdict, message, tries = response.verdict, response.message, over
    else:
        verdict, message = _unanswered(last)
        response, number, tries = None, last.number if last else None, over
    return Outcome(
        custom_id=custom_id,
        verdict=verdict,
        response=response,
        attempt=number,
        backend=attempts[number].backend if number in attempts else None,
        reused_from=attempts[number].reused_from if response is not None and number in attempts else None,
        conflicts=chosen.conflicts,
        message=message,
        code=response.code if response is not None else None,
        tries=tries,
        in_flight=last is not None and last.in_flight,
    )


def _counts(error: Response, number: int, last: Attempt | None) -> bool:
    """Whether an error stands: not where a later attempt took the row, nor where it says only that an engine died,
    in an attempt that is known to have died or still runs: the row will be sent again."""
    if last is None or number > last.number:
        return True
    if number < last.number:
        return False
    return not (error.engine_died and last.state != "collected")


def _unanswered(last: Attempt | None) -> tuple[Verdict, str]:
    if last is None:
        return Verdict.PENDING, "not sent yet"
    if last.state == "collected":
        if last.ending in ("expired", "cancelled"):
            word = "expired" if last.ending == "expired" else "was cancelled"
            return Verdict.EXPIRED, f"the batch of attempt {last.number} {word} before this request was run"
        return Verdict.MISSING, f"sent in attempt {last.number}, which is over, and no response came back"
    if last.state == "elsewhere" and last.elsewhere is not None:
        return (
            Verdict.PENDING,
            f"attempt {last.number} was given to a machine elsewhere, until {last.elsewhere.expires}",
        )
    if last.elsewhere is not None:
        return Verdict.PENDING, f"attempt {last.number}: {last.message}"
    reasons = {
        "died": f"the engine ended during attempt {last.number}, before this row had a response",
        "refused": f"nothing of attempt {last.number} was run: {last.message or 'it was refused'}",
        "doubtful": f"attempt {last.number} is doubtful: nobody knows whether its batch was created",
    }
    return Verdict.PENDING, reasons.get(last.state, f"attempt {last.number} is still running")


def conflict_message(conflicts: list[Response]) -> str:
    return f"{len(conflicts) + 1} different answers within one attempt; the first is kept"
