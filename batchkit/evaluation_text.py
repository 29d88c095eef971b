"""An evaluation as text: what `evaluate` prints."""

from __future__ import annotations

from collections.abc import Iterator

from batchkit.evaluation import Evaluation
from batchkit.figures import Statistics
from batchkit.scores import WAYS, Score
from batchkit.wording import counted

SHOWN_ERRORS = 5
_LONGEST = 40


def as_text(evaluation: Evaluation) -> str:
    found = evaluation.statistics
    counts = ", ".join(f"{verdict} {count:,}" for verdict, count in found.verdicts.items() if count)
    lines = [f"{counted(found.total_samples, 'row')}: {counts}", *_accuracy(found), *_spreads(found), *_errors(found)]
    return "\n".join(lines)


def _accuracy(found: Statistics) -> Iterator[str]:
    if not found.accuracy:
        yield "\nno row has a right answer to compare with; --answer-field names the field that has it"
        return
    yield f"\naccuracy against {found.answer_field!r} (95% interval, Wilson); a row without an answer is wrong"
    yield from _table("all rows", {"": found.accuracy})
    if found.without_truth:
        yield f"{found.without_truth:,} rows have no right answer to compare with, and are not in it"
    for field, values in found.by.items():
        yield ""
        yield from _table(f"by {field}", values)


def _table(title: str, groups: dict[str, dict[str, Score]]) -> list[str]:
    width = max(len(title), *(len(_short(value)) for value in groups))
    lines = [
        f"{title:{width}}  {'compared':8} {'rows':>8} {'right':>8}  {'accuracy':>8}  {'95% interval':15}  of answered"
    ]
    for value, scores in groups.items():
        name = _short(value)
        for way in WAYS:
            if way in scores:
                lines.append(f"{name:{width}}  {way:8} {_score(scores[way])}".rstrip())
                name = ""
    return lines


def _score(score: Score) -> str:
    low, high = score.interval or (0.0, 0.0)
    of_answered = "-" if score.accuracy_of_answered is None else f"{score.accuracy_of_answered:.1%}"
    share = f"{score.accuracy or 0:8.1%}"
    interval = f"{low:.1%} – {high:.1%}"
    return f"{score.rows:8,} {score.right:8,}  {share}  {interval:15}  {of_answered} of {score.answered:,}"


def _spreads(found: Statistics) -> Iterator[str]:
    named = {
        "prompt tokens": found.prompt_tokens,
        "completion tokens": found.completion_tokens,
        "answer characters": found.answer_characters,
    }
    known = {name: spread for name, spread in named.items() if spread is not None}
    if known:
        yield f"\n{'':17} {'min':>8} {'p50':>8} {'p90':>8} {'p99':>8} {'max':>8} {'mean':>10}"
    for name, one in known.items():
        yield f"{name:17} {one.min:8,} {one.p50:8,} {one.p90:8,} {one.p99:8,} {one.max:8,} {one.mean:10,.1f}"


def _errors(found: Statistics) -> Iterator[str]:
    if found.errors:
        yield "\nerrors, the commonest first"
    for error in found.errors[:SHOWN_ERRORS]:
        lines = ", ".join(str(example.line) for example in error.examples)
        yield f"{error.count:8,}  {error.verdict}: {error.message[:120]} (lines {lines})"
    if len(found.errors) > SHOWN_ERRORS:
        yield f"          … and {len(found.errors) - SHOWN_ERRORS:,} more kinds, in statistics.json"


def _short(value: str) -> str:
    return value if len(value) <= _LONGEST else value[: _LONGEST - 1] + "…"
