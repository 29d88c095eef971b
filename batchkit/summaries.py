"""Counts of a merge: what `summary.json` says and what the exit code is read off."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterable
from typing import Any

import msgspec

from batchkit.billing import Spent
from batchkit.jobs import Attempt
from batchkit.outcomes import Outcome
from batchkit.responses import ANSWERS, Verdict

COMMONEST = 5
MAX_GROUPS = 1000
"""So many different errors are told apart; memory must not grow with a run in which every row fails differently."""


class Tokens(msgspec.Struct, kw_only=True):
    """Of the responses that count; what superseded or repeated responses cost is not in it, nor what was reused."""

    prompt: int = 0
    completion: int = 0
    total: int = 0


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One of several merged runs: the rows `[start, end)` of the task file."""

    run: str
    start: int
    end: int
    model: str


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of the task file that are in none of the merged runs; `end` is None for the end of the file."""

    start: int
    end: int | None

    @property
    def rows(self) -> str:
        if self.end is None:
            return f"the rows from {self.start:,} on"
        return f"rows {self.start:,} to {self.end - 1:,}"


class CommonError(msgspec.Struct, kw_only=True):
    """Errors that differ in numbers alone count as one; message and custom_id are those of the first."""

    verdict: Verdict
    message: str
    count: int
    custom_id: str


class Summary(msgspec.Struct, kw_only=True):
    """What a merge found. `verdicts` has all ten and adds up to `rows`. `spent` is None for a pile.

    `prepared` is False while `prepare` has not finished: there are more rows to come. `started` to `finished` spans
    the attempts; `seconds` counts only the time in which at least one that has ended was under way. Of a pile, which
    has no attempts, nothing is known of time. `reused` rows have an answer of another run: they are in `verdicts`,
    and in nothing that says what this run has taken. Nor are `repeated` rows, whose request was sent for another row of
    their shard and stands for them, too. `retry_file` is None where the rows are no tasks without what came
    beside them; `send_rest` is then the command that asks again. `parts`, `gaps` and `differences` are there where
    several runs were merged: see `parts`.
    """

    rows: int
    verdicts: dict[Verdict, int]
    unexpected: int
    unreadable: int
    tokens: Tokens
    spent: Spent | None
    model: str | None
    backends: list[str]
    prepared: bool
    started: str | None
    finished: str | None
    seconds: float | None
    answers_per_second: float | None
    errors: list[CommonError]
    output: str
    retry_file: str | None
    unexpected_file: str | None
    send_rest: str | None = None
    reused: int = 0
    repeated: int = 0
    parts: list[Part] = []
    gaps: list[Gap] = []
    differences: list[str] = []

    @property
    def answers(self) -> int:
        return sum(count for verdict, count in self.verdicts.items() if verdict in ANSWERS)

    @property
    def has_failures(self) -> bool:
        """Whether there are rows that have no answer, and are not waiting for one."""
        return self.answers + self.verdicts[Verdict.PENDING] < self.rows

    @property
    def exit_code(self) -> int:
        """8: rows are pending, or not prepared yet; 3: some rows have no answer, or are in no run; else 0."""
        if self.verdicts[Verdict.PENDING] or not self.prepared:
            return 8
        return 0 if self.answers == self.rows and not self.gaps else 3


class Tally:
    """Counts outcomes as they are written. `groups` bounds the different errors that are told apart."""

    def __init__(self, groups: int | None = MAX_GROUPS) -> None:
        self._groups = groups
        self.rows = 0
        self.reused = 0
        self.repeated = 0
        self._free = 0  # answers that this run did not ask for
        self.unexpected = 0
        self.unreadable = 0
        self._verdicts: dict[Verdict, int] = dict.fromkeys(Verdict, 0)
        self._tokens = [0, 0, 0]
        self._errors: dict[tuple[Verdict, str], CommonError] = {}

    def add(self, outcome: Outcome, verdict: Verdict, error: str | None) -> None:
        self.rows += 1
        self._verdicts[verdict] += 1
        self.reused += outcome.reused_from is not None
        self.repeated += outcome.same_as is not None
        if not outcome.is_paid_here:
            self._free += verdict in ANSWERS
        elif outcome.response is not None and (usage := outcome.response.usage):
            self._add_tokens(usage)
        if error is not None and verdict is not Verdict.PENDING:
            self._add_error(outcome, verdict, error)

    def add_answers(
        self, verdict: Verdict, usages: Iterable[tuple[dict[str, Any] | None, int]], *, reused: bool
    ) -> None:
        """Plain answers by their usage, each with how many there were."""
        for usage, count in usages:
            self.rows += count
            self._verdicts[verdict] += count
            if reused:
                self.reused += count
                self._free += count
            elif usage:
                self._add_tokens(usage, count)

    def absorb(self, other: Tally) -> None:
        """Add what was counted of the rows behind these; `other` has all its errors apart."""
        self.rows += other.rows
        self.reused += other.reused
        self.repeated += other.repeated
        self._free += other._free
        self.unexpected += other.unexpected
        self.unreadable += other.unreadable
        for verdict, count in other._verdicts.items():
            self._verdicts[verdict] += count
        self._tokens = [one + more for one, more in zip(self._tokens, other._tokens, strict=True)]
        for group, error in other._errors.items():
            self._add_group(group, error)

    def _add_tokens(self, usage: dict[str, Any], count: int = 1) -> None:
        prompt = usage.get("prompt_tokens") or usage.get("input_tokens") or 0
        completion = usage.get("completion_tokens") or usage.get("output_tokens") or 0
        if isinstance(prompt, int) and isinstance(completion, int):
            total = usage.get("total_tokens")
            self._tokens[0] += prompt * count
            self._tokens[1] += completion * count
            self._tokens[2] += (total if isinstance(total, int) else prompt + completion) * count

    def _add_error(self, outcome: Outcome, verdict: Verdict, error: str) -> None:
        group = (verdict, str(outcome.code) if verdict is Verdict.REJECTED and outcome.code else shape(error))
        self._add_group(group, CommonError(verdict=verdict, message=error[:500], count=1, custom_id=outcome.custom_id))

    def _add_group(self, group: tuple[Verdict, str], error: CommonError) -> None:
        known = self._errors.get(group)
        if known is not None:
            known.count += error.count
        elif self._groups is None or len(self._errors) < self._groups:
            self._errors[group] = error

    def summary(
        self,
        *,
        output: str,
        retry_file: str | None,
        unexpected_file: str | None,
        send_rest: str | None = None,
        spent: Spent | None = None,
        model: str | None = None,
        attempts: Iterable[Attempt] = (),
        prepared: bool = True,
        parts: Iterable[Part] = (),
        gaps: Iterable[Gap] = (),
        differences: Iterable[str] = (),
    ) -> Summary:
        attempts = list(attempts)
        assert sum(self._verdicts.values()) == self.rows  # noqa: S101  # the promise; a failure here is our bug
        started, finished, seconds = _times([attempt for attempt in attempts if attempt.reused_from is None])
        answers = sum(count for verdict, count in self._verdicts.items() if verdict in ANSWERS) - self._free
        prompt, completion, total = self._tokens
        return Summary(
            rows=self.rows,
            verdicts=self._verdicts,
            unexpected=self.unexpected,
            unreadable=self.unreadable,
            tokens=Tokens(prompt=prompt, completion=completion, total=total),
            spent=spent,
            model=model,
            backends=sorted({attempt.backend for attempt in attempts}),
            prepared=prepared,
            started=started,
            finished=finished,
            seconds=seconds,
            answers_per_second=round(answers / seconds, 3) if seconds else None,
            errors=sorted(self._errors.values(), key=lambda error: -error.count)[:COMMONEST],
            output=output,
            retry_file=retry_file,
            unexpected_file=unexpected_file,
            send_rest=send_rest,
            reused=self.reused,
            repeated=self.repeated,
            parts=list(parts),
            gaps=list(gaps),
            differences=list(differences),
        )


_DIGITS = re.compile(r"\d+")


def shape(message: str) -> str:
    """What errors of one kind have in common: the message without its numbers."""
    return _DIGITS.sub("#", message[:300])


def _times(attempts: list[Attempt]) -> tuple[str | None, str | None, float | None]:
    """First start, last end, and the seconds that the attempts which have ended cover together."""
    spans = sorted((_seconds(attempt.started), _seconds(attempt.ended)) for attempt in attempts if attempt.ended)
    covered = 0.0
    until = float("-inf")
    for start, end in spans:
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return (
        min((attempt.started for attempt in attempts), default=None),
        max((attempt.ended for attempt in attempts if attempt.ended), default=None),
        round(covered, 3) if spans else None,
    )


def _seconds(moment: str | None) -> float:
    return dt.datetime.fromisoformat(moment or "").timestamp()
