"""`merge --flat`: a result as six columns, those of gemini-inference-async, whatever the rows have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from batchkit.errors import RowError, UsageError
from batchkit.manifests import Seal
from batchkit.outcomes import Outcome
from batchkit.responses import ANSWERS
from batchkit.results import Result, ResultEncoder
from batchkit.storage import open_read
from batchkit.tasks import DEFAULT_ID_FIELD, DEFAULT_IMAGE_FIELD, parse_object
from batchkit.vlmevalkit import ID_FIELDS as VLMEVALKIT_ID_FIELDS

COLUMNS = ("id", "question", "has_image", "response", "status", "error_message")
SEPARATOR = "|"

_decode_raw = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode


class _Flat(msgspec.Struct, gc=False):
    id: str
    question: str | None
    has_image: bool
    response: Any
    status: str
    error_message: str | None


@dataclass(frozen=True)
class FlatFields:
    """Which fields of a row mean what. None for `ids`: `id` where a row has it. `batch_format`: rows are requests.
    `custom_ids`: the custom_id is the user's own."""

    ids: tuple[str, ...] | None
    question: str = "question"
    images: tuple[str, ...] = (DEFAULT_IMAGE_FIELD,)
    batch_format: bool = False
    custom_ids: bool = False


def default_ids(input_format: str | None) -> tuple[str, ...]:
    """The id fields of rows where the user names none."""
    return VLMEVALKIT_ID_FIELDS if input_format == "vlmevalkit" else (DEFAULT_ID_FIELD,)


def fields_of(options: Mapping[str, Any]) -> FlatFields:
    """By the options that a manifest keeps."""
    ids, images = options.get("id_fields"), options.get("image_field")
    return FlatFields(
        ids=tuple(ids) if ids else default_ids(options.get("input_format")),
        question=options.get("question_field") or "question",
        images=tuple(images) if images else (DEFAULT_IMAGE_FIELD,),
        batch_format=options.get("input_format") == "batch",
    )


class FlatEncoder:
    """Makes the lines of flat results, row after row, from the position 0 unless `go_to` names another.

    `id` is the text of the row's id fields, joined by `SEPARATOR`, or the custom_id where that is the user's own
    (`custom_ids`, and rows that are requests); a row without one has its position. `status` is success where the
    verdict is one of the four answers, else error.
    """

    columns: ClassVar[Sequence[str]] = COLUMNS

    def __init__(self, parse: str, fields: FlatFields) -> None:
        self._results = ResultEncoder(parse=parse)
        self._fields = fields
        self._position = 0
        self._custom_ids = fields.custom_ids or fields.batch_format
        self._shown: dict[int, bool] = {}

    def turn_to(self, model: str | None, parse: str, schema: dict[str, Any] | None = None) -> None:
        """As that of `ResultEncoder`."""
        self._results.turn_to(model, parse, schema)

    def go_to(self, position: int, fields: FlatFields) -> None:
        """The rows to come begin at `position`, and are to be read so."""
        self._position, self._fields = position, fields
        self._custom_ids = fields.custom_ids or fields.batch_format

    def know(self, shown: dict[int, bool]) -> None:
        """`shown` tells by position whether the request of a row has an image; for others the row's fields tell. Rows
        of tables are kept without their images, and a bad image may have been left out."""
        self._shown = shown

    def encode(self, row: bytes, outcome: Outcome, images: Sequence[str] = ()) -> Result:  # noqa: ARG002  # no column
        judged = self._results.judge(outcome)
        try:
            fields = parse_object(row)
        except RowError:
            fields = {}
        line = _Flat(
            id=(outcome.custom_id if self._custom_ids else self._id(row, fields)) or str(self._position),
            question=self._question(fields),
            has_image=self._shown.get(self._position, self._has_image(fields)),
            response=judged.raw,
            status="success" if judged.verdict in ANSWERS else "error",
            error_message=judged.error,
        )
        self._position += 1
        return Result(_encode(line) + b"\n", judged.verdict, judged.error)

    def _id(self, row: bytes, fields: dict[str, Any]) -> str | None:
        names = self._fields.ids or (DEFAULT_ID_FIELD,)
        if any(fields.get(name) is None for name in names):
            return None
        raw = _decode_raw(row)  # 1.50 and 1e3 stay what they are
        return SEPARATOR.join(
            fields[name] if isinstance(fields[name], str) else bytes(raw[name]).decode() for name in names
        )

    def _question(self, fields: dict[str, Any]) -> str | None:
        value = last_text(fields) if self._fields.batch_format else fields.get(self._fields.question)
        if value is None or isinstance(value, str):
            return value
        return _encode(value).decode()

    def _has_image(self, fields: dict[str, Any]) -> bool:
        if self._fields.batch_format:
            return any(
                isinstance(part, dict) and part.get("type") in ("image_url", "input_image")
                for message in _messages(fields)
                for part in _parts(message)
            )
        return any(fields.get(name) not in (None, "", []) for name in self._fields.images)


def check_flat(prefix: str) -> None:
    """Raise `UsageError` for a prefix: the names of flat columns are settled."""
    if prefix:
        raise UsageError(
            f"--prefix {prefix!r}: goes not with --flat, whose columns have settled names", hint="leave one out"
        )


def has_image(request: bytes) -> bool:
    """Whether a request line of ours has an image; a text that quotes these words has backslashes in them."""
    return b'"type":"image_url"' in request or b'"type":"input_image"' in request


def shown_in(requests: Path | None, seal: Seal) -> dict[int, bool]:
    """By position, whether the request of a row has an image; nothing where there are no requests of ours."""
    if requests is None:
        return {}
    with open_read(str(requests)) as stream:
        shown = dict(zip(seal.asking, map(has_image, stream), strict=False))
    return shown | {position: shown[first] for position, first in seal.firsts.items() if first in shown}


def _messages(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a request: those of a chat, or what a response is asked for by."""
    body = fields.get("body")
    found = (body.get("messages") or body.get("input")) if isinstance(body, dict) else None
    if isinstance(found, str):
        return [{"role": "user", "content": found}]
    return [message for message in found if isinstance(message, dict)] if isinstance(found, list) else []


def _parts(message: dict[str, Any]) -> list[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else [content]


def last_text(fields: dict[str, Any]) -> str | None:
    """What the user said last."""
    for message in reversed(_messages(fields)):
        if message.get("role") == "user":
            texts = [part if isinstance(part, str) else part.get("text") for part in _parts(message) if part]
            return "".join(text for text in texts if isinstance(text, str))
    return None
