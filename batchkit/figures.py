"""The figures of an evaluation, added up result by result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from batchkit.distributions import Distribution, Spread
from batchkit.errors import UsageError
from batchkit.responses import ANSWERS, Verdict
from batchkit.scores import WAYS, Score, compare
from batchkit.summaries import MAX_GROUPS, shape

EXAMPLES = 3
OURS = ("model", "verdict")
"""What the accuracy can be told by beside the fields of the row."""
MOST_VALUES = 1000
"""Of a field that the accuracy is told by: more make no table, and would grow with the file."""


class Judged(msgspec.Struct, kw_only=True):
    """What the figures need of a result. `row` are the row's own fields; `line` counts from 1."""

    line: int
    row: dict[str, Any]
    model: str | None
    custom_id: str | None
    verdict: Verdict
    truth: Any
    raw: Any
    parsed: Any
    error: str | None
    usage: dict[str, Any] | None
    steps: int
    images: int


class Example(msgspec.Struct, kw_only=True):
    custom_id: str | None
    line: int
    message: str


class ErrorClass(msgspec.Struct, kw_only=True):
    """Errors of one verdict that differ in numbers alone (`#` in `message`)."""

    verdict: Verdict
    message: str
    count: int = 0
    examples: list[Example] = []


class Statistics(msgspec.Struct, kw_only=True):
    """What `statistics.json` says: the fields of the Bagel scripts first. `successful` have an answer; the averages and
    the two distributions are theirs. `other_errors` are of classes beyond the first thousand."""

    total_samples: int
    successful: int
    failed: int
    avg_reasoning_steps: float | None
    avg_generated_images: float | None
    reasoning_steps_distribution: dict[str, int]
    image_count_distribution: dict[str, int]
    verdicts: dict[str, int]
    answer_field: str | None
    without_truth: int
    accuracy: dict[str, Score]
    by: dict[str, dict[str, dict[str, Score]]]
    prompt_tokens: Spread | None
    completion_tokens: Spread | None
    answer_characters: Spread | None
    errors: list[ErrorClass]
    other_errors: int


class Figures:
    """Adds up. `by` are the fields whose values get scores of their own; `UsageError` where one has too many."""

    def __init__(self, by: Sequence[str] = ()) -> None:
        self._rows = self._answered = self._without_truth = self._other_errors = 0
        self._verdicts = dict.fromkeys(Verdict, 0)
        self._scores: dict[str, Score] = {}
        self._by: dict[str, dict[str, dict[str, Score]]] = {field: {} for field in by}
        self._steps, self._images = Distribution(), Distribution()
        self._prompt, self._completion, self._lengths = Distribution(), Distribution(), Distribution()
        self._errors: dict[tuple[Verdict, str], ErrorClass] = {}

    def add(self, result: Judged) -> dict[str, bool]:
        """Take in one result, and return for each way of comparing that applies whether it is right."""
        answered = result.verdict in ANSWERS
        self._rows += 1
        self._answered += answered
        self._verdicts[result.verdict] += 1
        if answered:
            self._steps.add(result.steps)
            self._images.add(result.images)
            if isinstance(result.raw, str):
                self._lengths.add(len(result.raw))
        self._add_tokens(result.usage or {})
        if result.error is not None and result.verdict is not Verdict.PENDING:
            self._add_error(result, result.error)
        return self._add_scores(result, answered=answered)

    def _add_scores(self, result: Judged, *, answered: bool) -> dict[str, bool]:
        found = compare(result.truth, result.row, result.raw, result.parsed)
        self._without_truth += not found
        groups = [self._scores]
        for field, values in self._by.items():
            value = _value(_of(result, field))
            if value not in values and len(values) == MOST_VALUES:
                raise UsageError(
                    f"--by {field}: has more than {MOST_VALUES:,} different values", hint="name a field with few values"
                )
            groups.append(values.setdefault(value, {}))
        for group in groups:
            for way, right in found.items():
                group.setdefault(way, Score()).add(right=right, answered=answered)
        return {way: right and answered for way, right in found.items()}

    def _add_tokens(self, usage: dict[str, Any]) -> None:
        prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
        completion = usage.get("completion_tokens", usage.get("output_tokens"))
        for count, distribution in ((prompt, self._prompt), (completion, self._completion)):
            if isinstance(count, int):
                distribution.add(count)

    def _add_error(self, result: Judged, error: str) -> None:
        group = (result.verdict, shape(error))
        if group not in self._errors and len(self._errors) == MAX_GROUPS:
            self._other_errors += 1
            return
        known = self._errors.setdefault(group, ErrorClass(verdict=result.verdict, message=group[1]))
        known.count += 1
        if len(known.examples) < EXAMPLES:
            known.examples.append(Example(custom_id=result.custom_id, line=result.line, message=error[:500]))

    def statistics(self, answer_field: str | None) -> Statistics:
        return Statistics(
            total_samples=self._rows,
            successful=self._answered,
            failed=self._rows - self._answered,
            avg_reasoning_steps=self._steps.mean(),
            avg_generated_images=self._images.mean(),
            reasoning_steps_distribution=self._steps.by_value(),
            image_count_distribution=self._images.by_value(),
            verdicts={str(verdict): count for verdict, count in self._verdicts.items()},
            answer_field=answer_field,
            without_truth=self._without_truth,
            accuracy=_settled(self._scores),
            by={
                field: {value: _settled(values[value]) for value in sorted(values)}
                for field, values in self._by.items()
            },
            prompt_tokens=self._prompt.spread(),
            completion_tokens=self._completion.spread(),
            answer_characters=self._lengths.spread(),
            errors=sorted(self._errors.values(), key=lambda error: -error.count),
            other_errors=self._other_errors,
        )


def _settled(scores: dict[str, Score]) -> dict[str, Score]:
    return {way: scores[way].settled() for way in WAYS if way in scores}


def _of(result: Judged, field: str) -> Any:
    """The value of the row's field, else of ours."""
    if field in result.row or field not in OURS:
        return result.row.get(field)
    return result.model if field == "model" else str(result.verdict)


def _value(value: Any) -> str:
    """The name of a value, another one for each: a text that could be mistaken for another value is in quotes."""
    if value is None:
        return "(none)"
    encoded = msgspec.json.encode(value).decode()
    if not isinstance(value, str):
        return encoded
    return value if value.isprintable() and value and value[0] not in '"(' and not _is_json(value) else encoded


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return False
    return True
