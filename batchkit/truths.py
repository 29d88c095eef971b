"""A result line → the row's own fields, what was asked, the truth, and what the model made of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from batchkit.errors import InputError
from batchkit.manifests import OUR_NAMES
from batchkit.responses import Verdict
from batchkit.tasks import DEFAULT_IMAGE_FIELD

ANSWER_FIELDS = ("answer", "Final Answer")
QUESTION_FIELDS = ("question", "Question")
REASONING_FIELD = "Text Reasoning Trace"
"""The names of VLMEvalKit and of the Bagel scripts, where the user says nothing."""

_TRUTH_IMAGE = re.compile(r"reasoning_image_(\d+)")
_PROBLEM_IMAGE = re.compile(r"problem_image_(\d+)")
_PARAGRAPHS = re.compile(r"\n\s*\n")

_decode = msgspec.json.Decoder(dict[str, Any]).decode


class Result(NamedTuple):
    """`row` are the row's own fields, `note` is the object `batchkit`."""

    row: dict[str, Any]
    model: str | None
    raw: Any
    parsed: Any
    error: str | None
    note: dict[str, Any]

    @property
    def verdict(self) -> Verdict:
        return Verdict(self.note["verdict"])

    @property
    def images(self) -> list[str]:
        """The images that the model made: paths from where the results lie, or links."""
        names = self.note.get("output_images")
        return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []

    @property
    def steps(self) -> int:
        """The texts between the images where the answer has both, else its paragraphs; no text is no step."""
        segments = self.note.get("text_segments")
        if isinstance(segments, int):
            return segments
        return sum(map(bool, map(str.strip, _PARAGRAPHS.split(self.raw)))) if isinstance(self.raw, str) else 0


def read_result(line: bytes, where: str) -> Result:
    """Raises `InputError` that begins with `where` for a line that no merge wrote."""
    try:
        fields = _decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise _no_result(where, f"not a JSON object: {exc}") from exc
    prefix = _prefix(fields)
    if prefix is None:
        raise _no_result(where, "it has no field 'batchkit' with a verdict")
    model, raw, parsed, error, note = (fields.pop(prefix + name, None) for name in OUR_NAMES)
    return Result(fields, model, raw, parsed, error, note)


def _prefix(fields: Mapping[str, Any]) -> str | None:
    """What was put before the names of our fields."""
    for name in reversed(list(fields)):
        note = fields[name]
        if name.endswith(OUR_NAMES[-1]) and isinstance(note, dict) and note.get("verdict") in set(Verdict):
            return name.removesuffix(OUR_NAMES[-1])
    return None


def _no_result(where: str, why: str) -> InputError:
    return InputError(
        f"{where}: is no result of batchkit merge: {why}",
        hint="evaluate reads results as JSONL, written without --flat: batchkit merge RUN",
    )


class Names(NamedTuple):
    """Which fields mean what. None for `answer`: the first of `ANSWER_FIELDS` that a row has; empty for `truth_images`
    and None for `images`: the Bagel names, and `image`."""

    answer: str | None
    question: str
    reasoning: str
    truth_images: Sequence[str]
    images: Sequence[str] | None

    def answer_in(self, row: Mapping[str, Any]) -> str | None:
        """The name of the field that holds the row's truth; None where it has none."""
        names = ANSWER_FIELDS if self.answer is None else (self.answer,)
        return next((name for name in names if name in row), None)

    def question_in(self, row: Mapping[str, Any]) -> Any:
        return next((row[name] for name in (self.question, *QUESTION_FIELDS) if name in row), None)

    def truth_images_in(self, row: Mapping[str, Any]) -> list[str]:
        return _texts(row, self.truth_images or _numbered(row, _TRUTH_IMAGE))

    def images_in(self, row: Mapping[str, Any]) -> list[tuple[int, str]]:
        """References to the images that were asked about, as the row has them, each with its number: that in the name
        of its field, else its place."""
        names = self.images or _numbered(row, _PROBLEM_IMAGE) or (DEFAULT_IMAGE_FIELD,)
        matches = [_PROBLEM_IMAGE.fullmatch(name) for name in names]
        if all(matches) and all(isinstance(row.get(name), str) for name in names if row.get(name)):
            numbers = [int(match[1]) for match in matches if match]
            return [(number, row[name]) for number, name in zip(numbers, names, strict=True) if row.get(name)]
        return list(enumerate(_texts(row, names), 1))


def images_of_request(fields: Mapping[str, Any]) -> list[str]:
    """The images in the messages of a request, as data URLs or links, in order."""
    body = fields.get("body")
    messages = (body.get("messages") or body.get("input")) if isinstance(body, dict) else None
    found = []
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            held = part.get("image_url") if isinstance(part, dict) else None
            url = held.get("url") if isinstance(held, dict) else held
            if isinstance(url, str):
                found.append(url)
    return found


def _numbered(row: Mapping[str, Any], pattern: re.Pattern[str]) -> list[str]:
    found = [(int(match[1]), name) for name in row if (match := pattern.fullmatch(name))]
    return [name for _, name in sorted(found)]


def _texts(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    values = [entry for name in names for entry in (row[name] if isinstance(row.get(name), list) else [row.get(name)])]
    return [value for value in values if isinstance(value, str) and value]
