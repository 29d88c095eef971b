"""A row and its outcome → the result line: the row's own bytes first, our fields spliced behind them.

Rows are not parsed and dumped again: numbers, escapes and the order of keys stay as the user wrote them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import msgspec

from batchkit.answers import ParseError, Parser, parser
from batchkit.errors import UsageError
from batchkit.manifests import OUR_NAMES, Seal
from batchkit.outcomes import Outcome
from batchkit.responses import Response, Verdict

_ANSWERED, _TRUNCATED, _REFUSED = Verdict.ANSWERED, Verdict.TRUNCATED, Verdict.REFUSED
_INVALID, _CONFLICTING, _REJECTED = Verdict.INVALID, Verdict.CONFLICTING, Verdict.REJECTED
_MAY_PARSE = frozenset({_ANSWERED, _TRUNCATED, _CONFLICTING})
_KEEPS_ANSWER = frozenset({*_MAY_PARSE, _REFUSED})


class _Note(msgspec.Struct, gc=False):
    """The object `batchkit` of a result."""

    custom_id: str | None
    verdict: Verdict
    finish_reason: str | None
    usage: dict[str, Any] | None
    backend: str | None
    attempt: int | None
    reused_from: str | msgspec.UnsetType = msgspec.UNSET
    same_as: str | msgspec.UnsetType = msgspec.UNSET
    output_images: Sequence[str] | msgspec.UnsetType = msgspec.UNSET
    text_segments: int | msgspec.UnsetType = msgspec.UNSET
    conflicts: list[dict[str, Any]] | msgspec.UnsetType = msgspec.UNSET
    line: str | msgspec.UnsetType = msgspec.UNSET


class Result(msgspec.Struct, frozen=True, gc=False):
    """A result as a line (with its line feed), and what counts: the verdict after parsing, the error if any."""

    line: bytes
    verdict: Verdict
    error: str | None


class Splice(NamedTuple):
    """What all results have in common that differ only in row, id, answer and usage. A result is the row without its
    closing brace, then `head`, the answer, `parsed`, the parsed answer, `note`, the id, `stop`, the usage, `end`."""

    head: bytes
    parsed: bytes
    note: bytes
    stop: bytes
    end: bytes


class Judged(NamedTuple):
    """What became of a row once its answer is parsed."""

    verdict: Verdict
    error: str | None
    raw: Any
    parsed: Any


class ResultEncoder:
    """Makes result lines. `model` stands where a response names none.

    Raises `UsageError` for a `parse` that is none; `encode` raises it for a row that uses one of our names.
    """

    columns: ClassVar[Sequence[str]] = ()

    def __init__(self, *, parse: str = "text", prefix: str = "", model: str | None = None, schema: Any = None) -> None:
        self._parse, self._kind = parser(parse, schema), parse
        self._has_prefix = bool(prefix)
        self._model = model
        self._names = [prefix + name for name in OUR_NAMES]
        # A key may also be written with escapes; those of ASCII letters all begin like this.
        escape = b"\\u00" if not prefix or (prefix.isascii() and prefix.isidentifier()) else b"\\"
        names = dict(zip(OUR_NAMES, self._names, strict=True))
        try:
            self._tail: Any = msgspec.defstruct("Tail", list(OUR_NAMES), rename=names, gc=False)
        except ValueError as exc:
            raise UsageError(f"--prefix {prefix!r}: {exc}", hint="--prefix answer_") from exc
        self._needles = [*map(msgspec.json.encode, self._names), escape]
        self._encode = msgspec.json.Encoder().encode

    def turn_to(self, model: str | None, parse: str, schema: dict[str, Any] | None = None) -> None:
        """The rows to come are of a run of this model; their answers must match `schema`, where they are parsed as
        JSON."""
        self._model = model
        self._parse, self._kind = parser(parse, schema if parse == "json" else None), parse

    @property
    def parse(self) -> Parser | None:
        """How answers are parsed now; None: only the white space around them goes."""
        return self._parse if self._kind != "text" else None

    def splice(self, outcome: Outcome) -> Splice:
        """The common parts of all results that are like that of `outcome`, which is a plain answer, and whose rows use
        none of our names."""
        response = outcome.response
        model = (response.model if response is not None else None) or self._model
        names = [self._encode(name) + b":" for name in self._names]
        note = self._encode(_note(outcome, outcome.verdict, response))
        # What the usage and the id are replaced in has none of the user's text before them.
        head, _, rest = note.partition(b'"custom_id":null,')
        stop, _, end = rest.partition(b'"usage":null')
        return Splice(
            b",%b%b,%b" % (names[0], self._encode(model), names[1]),
            b"," + names[2],
            b",%bnull,%b%b" % (names[3], names[4], head + b'"custom_id":'),
            b"," + stop + b'"usage":',
            end + b"}\n",
        )

    def needs_look(self, seal: Seal) -> bool:
        """Whether rows of this shard may use one of our names: `prepare` has seen those that they use."""
        return self._has_prefix or bool(seal.names_in_use)

    def judge(self, outcome: Outcome) -> Judged:
        verdict, error, response = outcome.verdict, outcome.message, outcome.response
        raw = parsed = None
        if response is not None and verdict in _KEEPS_ANSWER:
            raw = response.answer
            if verdict in _MAY_PARSE:
                try:
                    parsed = self._parse(raw)
                except ParseError as exc:
                    if verdict is _ANSWERED:
                        verdict, error = _INVALID, str(exc)
        return Judged(verdict, error, raw, parsed)

    def encode(self, row: bytes, outcome: Outcome, images: Sequence[str] = ()) -> Result:
        """The result of one row. Only rejected rows may be anything but a JSON object. `images` are the files of those
        that the model made."""
        verdict, error, raw, parsed = self.judge(outcome)
        response = outcome.response
        note = _note(outcome, verdict, response)
        if images:
            note.output_images = images
            if response is not None and response.segments is not None:
                note.text_segments = response.segments
        body = row.strip()
        is_object = body[:1] == b"{" and body[-1:] == b"}" and (verdict is not _REJECTED or _is_object(body))
        if is_object:
            self.check_names(body, outcome.custom_id)
        else:
            note.line = row.decode("utf-8", "replace")
        model = (response.model if response is not None else None) or self._model
        tail = self._encode(self._tail(model, raw, parsed, error, note))
        return Result(_splice(body, tail) if is_object else tail + b"\n", verdict, error)

    def check_names(self, body: bytes, custom_id: str) -> None:
        """Raise `UsageError` where the row uses one of our names."""
        for needle in self._needles:
            if needle in body:
                break
        else:
            return
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        used = [name for name in self._names if name in fields]
        if used:
            raise UsageError(
                f"row {custom_id} has a field {used[0]!r} already, which a result would overwrite",
                hint=f"--prefix {_free_prefix(fields)} puts that before the names of our fields",
            )


def _note(outcome: Outcome, verdict: Verdict, response: Response | None) -> _Note:
    note = _Note(
        outcome.custom_id or None,
        verdict,
        response.finish_reason if response is not None else None,
        response.usage if response is not None else None,
        outcome.backend,
        outcome.attempt,
    )
    if outcome.reused_from is not None:
        note.reused_from = outcome.reused_from
    if outcome.same_as is not None:
        note.same_as, note.usage = outcome.same_as, None  # it stands in the result of the row that was sent
    if outcome.conflicts:
        note.conflicts = [
            {"raw_response": other.answer, "verdict": other.verdict, "finish_reason": other.finish_reason}
            for other in outcome.conflicts
        ]
    return note


def _splice(body: bytes, tail: bytes) -> bytes:
    head = body[:-1].rstrip()
    return b"%b%b%b\n" % (head, b"" if head == b"{" else b",", tail[1:])


def _is_object(body: bytes) -> bool:
    try:
        msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def _free_prefix(fields: dict[str, Any]) -> str:
    for prefix in ("answer_", "batchkit_", "bk_"):
        if not any(prefix + name in fields for name in OUR_NAMES):
            return prefix
    return "NAME_"
