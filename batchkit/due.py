"""Which rows `submit` has to send, by what became of them."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Protocol

from batchkit.answers import ParseError, Parser, parser
from batchkit.outcomes import Outcome, ShardOutcomes
from batchkit.responses import Verdict


class Standing(Protocol):
    """What decides whether a row is sent again: of an `Outcome`, or of rows that were counted."""

    @property
    def verdict(self) -> Verdict: ...

    @property
    def tries(self) -> int: ...

    @property
    def passing(self) -> bool: ...

    @property
    def in_flight(self) -> bool: ...


def to_send(
    outcomes: ShardOutcomes,
    *,
    attempts: int,
    retry: frozenset[Verdict] = frozenset(),
    only: Container[int] | None = None,
) -> list[int]:
    """The positions that `submit` has to send (again), ascending.

    What is pending; what is missing or failed in passing (expired too) after fewer than `attempts` tries; and the
    verdicts in `retry`, however often they were tried: `invalid` ones are those that do not match the run's schema.
    Rejected rows never; `only` these positions, where given. For a row whose request is that of another, the other.
    """
    if only is not None:
        firsts, rows = outcomes.seal.firsts, range(outcomes.seal.start, outcomes.seal.end)
        only = {firsts.get(position, position) for position in rows if position in only}
    judge = Verdict.INVALID in retry and outcomes.schema is not None
    matches = parser("json", outcomes.schema) if judge else None
    return [
        position
        for position, outcome in enumerate(outcomes.outcomes, outcomes.seal.start)
        if outcome.same_as is None
        and (only is None or position in only)
        and (is_due(outcome, attempts, retry) or (matches is not None and _is_invalid(outcome, matches)))
    ]


def _is_invalid(outcome: Outcome, parse_answer: Parser) -> bool:
    if outcome.verdict is not Verdict.ANSWERED or outcome.response is None or outcome.in_flight:
        return False
    try:
        parse_answer(outcome.response.answer)
    except ParseError:
        return True
    return False


def to_retry(outcomes: ShardOutcomes, positions: Iterable[int], *, attempts: int) -> list[int]:
    """Those of `positions` that failed in passing or expired, after fewer than `attempts` tries."""
    start = outcomes.seal.start
    known = ((position, outcomes.outcomes[position - start]) for position in positions)
    return [
        position
        for position, outcome in known
        if outcome.verdict in (Verdict.FAILED, Verdict.EXPIRED) and is_due(outcome, attempts, frozenset())
    ]


def is_due(row: Standing, attempts: int, retry: frozenset[Verdict]) -> bool:
    """Whether `submit` has to send it, as far as its verdict says."""
    verdict = row.verdict
    if verdict is Verdict.REJECTED or row.in_flight:
        return False
    if verdict is Verdict.PENDING or verdict in retry:
        return True
    if verdict is Verdict.MISSING:
        return row.tries < attempts
    if verdict is Verdict.EXPIRED:
        return row.tries < attempts
    if verdict is Verdict.FAILED:
        return row.passing and row.tries < attempts
    return False
