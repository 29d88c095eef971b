"""Whether an answer is right: three ways to compare it with the truth of its row, each where it applies.

| way | applies to | compares |
|---|---|---|
| `exact` | every row with a truth | the texts, without white space around them and without case; JSON by its values |
| `choice` | a truth that is one letter, or the text of one of the row's options | the choice in the answer, as `--parse choice` finds it; truth and answer are each a letter of the options, else the text of one |
| `number` | a truth that is a number | the number in the answer, as `--parse number` finds it, to one part in a million |

A truth that is a list holds several right answers, and is one itself. What a model thought aloud (`<think>…</think>`) is no answer.
"""  # noqa: E501  # a table

from __future__ import annotations

import contextlib
import math
import re
import string
from collections.abc import Iterable
from typing import Any

import msgspec

from batchkit.answers import ParseError, parser
from batchkit.distributions import wilson

WAYS = ("exact", "choice", "number")
TOLERANCE = 1e-6

_choice = parser("choice")
_number = parser("number")
_NUMERIC = re.compile(r"[-−+]?[$€£¥]?\s?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?\s?%?")
_EXACT = 2.0**53  # up to here a float holds every whole number
_encode = msgspec.json.Encoder().encode
_encode_sorted = msgspec.json.Encoder(order="deterministic").encode
_OPTIONS = ("options", "choices")


class Score(msgspec.Struct, kw_only=True):
    """`rows` have a truth that the way applies to; of these `answered` have an answer, and `right` a right one.

    `accuracy` is of all rows: one without an answer is wrong. Intervals are Wilson's, 95%.
    """

    rows: int = 0
    answered: int = 0
    right: int = 0
    accuracy: float | None = None
    interval: tuple[float, float] | None = None
    accuracy_of_answered: float | None = None
    interval_of_answered: tuple[float, float] | None = None

    def add(self, *, right: bool, answered: bool) -> None:
        self.rows += 1
        self.answered += answered
        self.right += right and answered

    def settled(self) -> Score:
        """With what follows from the counts."""
        return Score(
            rows=self.rows,
            answered=self.answered,
            right=self.right,
            accuracy=self.right / self.rows if self.rows else None,
            interval=wilson(self.right, self.rows),
            accuracy_of_answered=self.right / self.answered if self.answered else None,
            interval_of_answered=wilson(self.right, self.answered),
        )


def compare(truth: Any, row: dict[str, Any], raw: Any, parsed: Any) -> dict[str, bool]:
    """For each way that applies, whether the answer is right; nothing where there is no truth.

    `raw` and `parsed` are the result's answers, None where there is none.
    """
    truths = [one for one in (truth if isinstance(truth, list) else [truth]) if one is not None and one != ""]
    if not truths:
        return {}
    answer = raw if parsed is None else parsed
    found = {"exact": answer is not None and _is_same(answer, [*truths, truth])}
    options = _options(row)
    letters = {letter for one in truths if (letter := _letter(one, options)) is not None}
    if letters:
        found["choice"] = _chosen(raw, options) in letters
    numbers = [number for one in truths if (number := _numeric(one)) is not None]
    if numbers:
        found["number"] = _is_near(raw, numbers)
    return found


def _is_same(answer: Any, truths: Iterable[Any]) -> bool:
    """Whether the answer is one of these, as a text or as a value."""
    forms = _forms(answer, as_json=False)
    return any(forms & _forms(truth, as_json=isinstance(answer, (dict, list))) for truth in truths)


def _forms(value: Any, *, as_json: bool) -> set[str]:
    """The ways to write a value: as it is, and so that equal values are alike (the order of keys, 2 and 2.0). With
    `as_json` a text that is JSON stands for its value, too."""
    if not isinstance(value, str):
        return {_encode(value).decode().casefold(), _encode_sorted(_whole(value)).decode().casefold()}
    forms = {_spoken(value).strip().casefold()}
    if as_json:
        with contextlib.suppress(msgspec.DecodeError, UnicodeEncodeError, RecursionError):
            forms.add(_encode_sorted(_whole(msgspec.json.decode(value))).decode().casefold())
    return forms


def _whole(value: Any) -> Any:
    """The value with whole numbers as such, wherever they are in it."""
    if isinstance(value, dict):
        return {name: _whole(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_whole(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT else value


def _spoken(text: str) -> str:
    return text.rpartition("</think>")[2]


def _options(row: dict[str, Any]) -> dict[str, str]:
    """Letter → text: fields A, B, C …, or a list or an object in `options` or `choices`."""
    listed = next((row[name] for name in _OPTIONS if isinstance(row.get(name), (list, dict))), None)
    if isinstance(listed, dict):
        return {str(letter).upper(): str(text) for letter, text in listed.items() if len(str(letter)) == 1}
    texts: Iterable[Any] = listed if listed is not None else _fields(row)
    return {letter: str(text) for letter, text in zip(string.ascii_uppercase, texts, strict=False)}


def _fields(row: dict[str, Any]) -> Iterable[Any]:
    for letter in string.ascii_uppercase:
        if row.get(letter) in (None, ""):
            return
        yield row[letter]


def _letter(truth: Any, options: dict[str, str]) -> str | None:
    """The letter that a truth is, or the one of the option that it is the text of."""
    if not isinstance(truth, (str, int, float)) or isinstance(truth, bool):
        return None
    text = str(truth).strip()
    bare = text.strip("(). ").upper()
    if len(bare) == 1 and bare in string.ascii_uppercase and (not options or bare in options):
        return bare
    return _by_text(text, options)


def _by_text(text: str, options: dict[str, str]) -> str | None:
    wanted = text.strip().casefold()
    return next((letter for letter, option in options.items() if option.strip().casefold() == wanted), None)


def _chosen(raw: Any, options: dict[str, str]) -> str | None:
    """The letter of an answer, by the rules of a truth; else what is chosen in it, by the same rules."""
    if not isinstance(raw, str):
        return None
    if (letter := _letter(_spoken(raw), options)) is not None:
        return letter
    try:
        return _letter(_choice(raw), options)
    except ParseError:
        return None


def _numeric(truth: Any) -> float | None:
    """The number that a truth is as a whole."""
    if isinstance(truth, bool) or not isinstance(truth, (str, int, float)):
        return None
    if isinstance(truth, str) and not (_NUMERIC.fullmatch(truth.strip()) and any(map(str.isdigit, truth))):
        return None
    try:
        return float(_number(truth))
    except (ParseError, OverflowError):
        return None


def _is_near(raw: Any, numbers: list[float]) -> bool:
    try:
        found = float(_number(raw))
    except (ParseError, OverflowError):
        return False
    return any(math.isclose(found, number, rel_tol=TOLERANCE) for number in numbers)
