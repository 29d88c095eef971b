"""Raw text → parsed answer: what `merge --parse` does. What does not parse is an `invalid` answer, never a wrong one.

| spec | result | rule |
|---|---|---|
| `text` | text | without the white space around it |
| `json` | any JSON | the whole text; else the first fenced block that is JSON; else the first balanced object or array |
| `choice` | a capital letter | the text is one letter; else the last «answer is X», «Answer: X», boxed; else a letter that leads (`B.`, `(C) …`) or stands alone on the last line; else the only one in brackets, bold, or in a short text |
| `number` | int or float | the last marked one («answer is 42», «= 42», boxed, `#### 42`); else the last one. Signs of currency and per cent are dropped, commas between groups of three digits too |
| `regex:…` | text | the first group that took part in the first match; the whole match where there are no groups |

What a model thought aloud (`<think>…</think>`) counts for `text` and `regex:…` only. The article «A» is no choice.
"""  # noqa: E501  # a table

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

import msgspec

from batchkit import schemas
from batchkit.errors import UsageError

Parser = Callable[[Any], Any]
KINDS = ("text", "json", "choice", "number", "regex:…")


class ParseError(ValueError):
    """An answer that does not parse; the text says why, in a few words."""


def parser(spec: str, schema: Any = None) -> Parser:
    """The parser that `spec` names: answer in, parsed answer out, `ParseError` where it does not parse.

    `schema` is a decoded JSON schema (`json` only). Answers that are no text (vectors, scores, tool calls) come out
    as they are, where `spec` allows them. Raises `UsageError` for a spec, pattern or schema that is none.
    """
    if schema is not None and spec != "json":
        raise UsageError(f"a response schema needs --parse json, not {spec!r}", hint="--parse json")
    if spec.startswith("regex:"):
        return _regex_parser(spec.removeprefix("regex:"))
    if spec == "json":
        return _json_parser(schema)
    parsers: dict[str, Parser] = {"text": _text, "choice": _choice, "number": _number}
    if spec not in parsers:
        raise UsageError(f"--parse {spec!r} is not known", hint=f"one of {', '.join(KINDS)}")
    return parsers[spec]


def _text(answer: Any) -> Any:
    return answer.strip() if isinstance(answer, str) else answer


def _spoken(answer: Any) -> str:
    """The text behind what the model thought aloud; the opening tag may have been part of the prompt."""
    if not isinstance(answer, str):
        raise ParseError("the answer is not text")
    return answer.rpartition("</think>")[2].strip()


# -- regex -----------------------------------------------------------------------------------------------------------


def _regex_parser(pattern: str) -> Parser:
    try:
        compiled = re.compile(pattern)
    except re.error as exc:
        raise UsageError(
            f"--parse regex: {pattern!r} is no regular expression: {exc}",
            hint=r"quote it for the shell: --parse 'regex:answer: (\w+)'",
        ) from exc

    def parse(answer: Any) -> str:
        if not isinstance(answer, str):
            raise ParseError("the answer is not text")
        match = compiled.search(answer)
        if match is None:
            raise ParseError("the pattern does not match")
        if not compiled.groups:
            return str(match[0])
        group: str | None = next((group for group in match.groups() if group is not None), None)
        if group is None:
            raise ParseError("the pattern matches, but none of its groups does")
        return group

    return parse


# -- json ------------------------------------------------------------------------------------------------------------

_FENCE = re.compile(r"```[\w-]*[ \t]*\r?\n?(.*?)```", re.DOTALL)
_decode = msgspec.json.Decoder().decode


def _json_parser(schema: Any) -> Parser:
    check = _schema_check(schema) if schema is not None else None

    def parse(answer: Any) -> Any:
        value = _find_json(_spoken(answer)) if isinstance(answer, str) else answer
        if check is not None:
            check(value)
        return value

    return parse


def _schema_check(schema: Any) -> Callable[[Any], None]:
    find_fault = schemas.checker(schema)

    def check(value: Any) -> None:
        try:
            fault = find_fault(value)
        except Exception as exc:  # a hostile answer, or a reference that only this answer leads to
            raise ParseError(f"cannot be checked against the schema: {type(exc).__name__}") from exc
        if fault is not None:
            raise ParseError(f"does not match the schema: {fault}")

    return check


def _find_json(text: str) -> Any:
    for candidate in (text, *_FENCE.findall(text)):
        try:
            return _decode(candidate)
        except msgspec.DecodeError:
            continue
        except (RecursionError, UnicodeEncodeError) as exc:
            raise ParseError("not usable JSON") from exc
    return _first_balanced(text)


def _first_balanced(text: str) -> Any:
    """The first object or array in prose. One that is cut off, or broken, does not give its inside for the whole."""
    scan = json.JSONDecoder()
    at = 0
    while (match := re.compile(r"[{\[]").search(text, at)) is not None:
        try:
            _, end = scan.raw_decode(text, match.start())
            return _decode(text[match.start() : end])
        except json.JSONDecodeError as exc:
            if exc.pos >= len(text) or exc.msg.startswith("Unterminated string"):
                raise ParseError("its JSON is cut off") from exc
            at = _behind_brackets(text, match.start())
        except (msgspec.DecodeError, RecursionError, ValueError) as exc:
            raise ParseError("not usable JSON") from exc
    raise ParseError("no JSON in it")


def _behind_brackets(text: str, start: int) -> int:
    depth = 0
    for match in re.compile(r"[{}\[\]]").finditer(text, start):
        depth += 1 if match[0] in "{[" else -1
        if depth == 0:
            return match.end()
    return start + 1


# -- choice ----------------------------------------------------------------------------------------------------------

_OPEN = r"[\s*_\"'“‘`(\[{$]*(?:\\(?:boxed|text|mathbf|mathrm)\{)*[*_\"'“‘`(\[{$]*"
_CLOSE = r"[*_\"'”’`)\]}$]*[.,:;!]?[*_\"'”’`)\]}$]*"
_NOT_WORD = r"(?![\w'’])"
# A letter behind which a sentence goes on is the article, unless it goes on the way one speaks of a choice.
_NOT_ARTICLE = r"(?!(?<=[AIa])\s+(?!(?:because|since|as|and|or|for|due|is|which|given|with)\b)[a-z])"
_NOT_DENIED = r"(?!\s+(?:is|are|was)\s+(?:not|wrong|incorrect|false)\b|\s+isn['’]t\b)"
_DENIAL = re.compile(r"\b(?:not|neither|wrong|incorrect|false)\b|n['’]t\b", re.IGNORECASE)
_WHOLE = re.compile(rf"{_OPEN}([A-Za-z]){_CLOSE}")
_SAID = re.compile(
    r"(?i:\b(?:answer|choice|option)\b(?:\s+(?:is|would be|should be|must be))?\s*[:=]?|\\boxed\{)"
    rf"{_OPEN}(?i:(?:option|choice)\s+)?{_OPEN}([A-Za-z]){_NOT_WORD}{_NOT_ARTICLE}{_NOT_DENIED}{_CLOSE}"
)
_LEADS = re.compile(
    r"[*_\"'`]*(?:[(\[]([A-Z])[)\]]|([A-Z])(?:[*_\"'`]*[).:,]|\s+[-–—]\s|[*_\"'`]*\s*(?:\n|$)))"
    r"(?!\s+(?:and|or)\b|(?<=,)\s*[A-Z]\b)"  # two choices are none
)
_SET_OFF = re.compile(r"\(([A-Z])\)|\*\*\(?([A-Z])\)?[.:]?\*\*|\[([A-Z])\]")
_ALONE = re.compile(rf"(?<![\w'’])([A-HJ-Z]){_NOT_WORD}{_NOT_ARTICLE}")
SHORT = 60
"""Characters up to which a single letter somewhere in the text is taken for the choice."""


def _choice(answer: Any) -> str:
    text = _spoken(answer)
    if match := _WHOLE.fullmatch(text):
        return match[1].upper()
    said = [match[1].upper() for match in _SAID.finditer(text) if match[1].isupper() or _ends_line(text, match.end())]
    if said:
        return said[-1]
    if match := _LEADS.match(text):
        return match[1] or match[2]
    if match := _WHOLE.fullmatch(text.rpartition("\n")[2].strip()):
        return match[1].upper()
    for pattern, limit in ((_SET_OFF, len(text)), (_ALONE, SHORT)):
        found: set[str] = {next(filter(None, match.groups())) for match in pattern.finditer(text)}
        if len(found) == 1 and len(text) <= limit and not _DENIAL.search(text):
            return found.pop()
    raise ParseError("no choice in it" if text else "the answer is empty")


def _ends_line(text: str, at: int) -> bool:
    return not text[at:].partition("\n")[0].strip()


# -- number ----------------------------------------------------------------------------------------------------------

# A minus sign between two digits or behind a word is a hyphen; digits inside a word (H2O) are no number.
_NUMBER = (
    r"(?<![\w.])(?P<sign>[-−+]?)[$€£¥]?[ ]?(?P<sign2>[-−+]?)"
    r"(?P<digits>(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)"
)
_ANY_NUMBER = re.compile(_NUMBER)
_MARKED_NUMBER = re.compile(
    r"(?i:\b(?:answer|result)\b(?:\s+(?:is|was|would be|should be))?\s*[:=]?|\\boxed\{|####)"
    rf"[\s*\"'“(\[{{~≈]*(?i:about|approximately|around|roughly|exactly)?[\s*\"'“(\[{{~≈]*{_NUMBER}"
)


def _number(answer: Any) -> int | float:
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        return answer
    text = _spoken(answer)
    found = list(_MARKED_NUMBER.finditer(text)) or list(_ANY_NUMBER.finditer(text))
    if not found:
        raise ParseError("no number in it" if text else "the answer is empty")
    match = found[-1]
    digits = match["digits"].replace(",", "")
    value = float(digits)
    if not math.isfinite(value):
        raise ParseError("its number is too large")
    if digits.isdigit() and abs(value) < 2**63:
        value = int(digits)
    return -value if "-" in (sign := match["sign"] or match["sign2"]) or "−" in sign else value
