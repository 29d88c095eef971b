"""Task file → rows → tasks.

A row is one line of the task file, kept byte for byte; of a table it is one row as a JSON object. A task is what
batchkit needs of it: who it is, its images, its question. The formats are read by modules of their own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

import msgspec

from batchkit.endpoints import endpoint_at
from batchkit.errors import RowError
from batchkit.inline_images import Images, as_source, images_in, is_inline, split_list

InputFormat = Literal["auto", "jsonl", "batch", "csv", "tsv", "parquet", "hf", "vlmevalkit"]

BATCH_KEYS = frozenset({"custom_id", "method", "url", "body"})
"""The keys of a request in OpenAI batch format (platform.openai.com/docs/guides/batch)."""

DEFAULT_IMAGE_FIELD = "image"
DOCUMENTS_FIELD = "documents"
"""Where the documents of score and rerank are, unless `--documents-field` says otherwise."""
DEFAULT_ID_FIELD = "id"

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


NONE_ATTACHED: Mapping[str, Images] = {}


class Row(NamedTuple):
    """`position` counts rows from 0, `line` lines from 1; `raw` has no line feed, `end` is the offset behind it.

    `attached` are images that travel beside `raw`, by their fields: a row of a table has their bytes there, not in its
    JSON. `fault` is the code and the message of a row that could not be read: it is rejected with these. `fetched` are
    its remote images by their addresses, each its bytes, or why it cannot be had; they are no part of what the row is.
    """

    position: int
    line: int
    raw: bytes
    end: int
    attached: Mapping[str, Images] | None = None
    fault: tuple[str, str] | None = None
    fetched: Mapping[str, bytes | str] | None = None

    @property
    def size(self) -> int:
        """About how many bytes the row takes in memory."""
        inline = sum(map(len, (self.fetched or {}).values()))
        for images in (self.attached or {}).values():
            inline += sum(map(len, images))
        return len(self.raw) + inline


class Place(NamedTuple):
    """A point between two lines of a task file: what comes next."""

    position: int = 0
    line: int = 1
    offset: int = 0


FILE_START = Place()


class ImageReference(NamedTuple):
    """An image of a row: the field that names it, and its path or URL as the row has it, or its encoded bytes."""

    field: str
    source: str | bytes


class Task(NamedTuple):
    """The validated view of a row. `images` are in the order of the fields; `attached` are the row's, of any field."""

    custom_id: str
    fields: dict[str, Any]
    images: list[ImageReference]
    question: str | None
    attached: Mapping[str, Images] = NONE_ATTACHED


@dataclass(frozen=True)
class Fields:
    """Which fields of a row mean what. None for `images` or `ids` is the default, used where a row has it.

    `compose` makes the text to ask of a row and its question, where the format has rules for that.
    """

    images: tuple[str, ...] | None = None
    question: str = "question"
    ids: tuple[str, ...] | None = None
    question_needed: bool = True
    compose: Callable[[Mapping[str, Any], str], str] | None = None


def make_custom_id(position: int, identity: bytes) -> str:
    """Position and digest: `17-5f2c…`, unique in a run, the same every time, at most 64 of [A-Za-z0-9_-]."""
    return f"{position}-{blake2b(identity, digest_size=8).hexdigest()}"


def parse_object(raw: bytes) -> dict[str, Any]:
    """Decode a row. Raises `RowError` where it is not JSON (RFC 8259: no NaN) or not an object."""
    try:
        value = _decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise RowError("json", _unusable(raw) or f"not valid JSON: {exc}") from exc
    except RecursionError as exc:
        raise RowError("json", "not usable JSON: nested too deeply") from exc
    if not isinstance(value, dict):
        raise RowError("object", f"not a JSON object but {_kind(value)}")
    return value


def _unusable(raw: bytes) -> str | None:
    """What keeps valid JSON from being used; None where it is not valid. RFC 8259 leaves both to the reader."""
    try:
        json.loads(raw.decode(), parse_constant=_refuse_constant, parse_int=_within_range, parse_float=_within_range)
    except OverflowError:
        return "not usable JSON: a number is too large to be kept (64-bit floats end at about 1.8e308)"
    except (ValueError, RecursionError):
        return None
    return r"not usable JSON: a text has half of a surrogate pair (\ud800 to \udfff), which UTF-8 cannot hold"


def _within_range(number: str) -> None:
    if math.isinf(float(number)):
        raise OverflowError


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def to_task(row: Row, names: Fields) -> Task:
    """Raises `RowError` where a field is missing or of the wrong kind, or the row has a fault already."""
    if row.fault is not None:
        raise RowError(*row.fault)
    fields = parse_object(row.raw)
    return Task(
        custom_id=make_custom_id(row.position, _identity(row, fields, names.ids)),
        fields=fields,
        images=find_images(fields, names.images, row.attached or NONE_ATTACHED),
        question=_question(fields, names),
        attached=row.attached or NONE_ATTACHED,
    )


def _identity(row: Row, fields: dict[str, Any], ids: tuple[str, ...] | None) -> bytes:
    if ids is None:
        return _encode(fields[DEFAULT_ID_FIELD]) if DEFAULT_ID_FIELD in fields else whole(row)
    missing = [name for name in ids if fields.get(name) is None]
    if missing:
        raise RowError("field", f"id field {missing[0]!r} is missing; {_has(fields)}")
    return _encode([fields[name] for name in ids])


def whole(row: Row) -> bytes:
    """What stands for all of a row, its attached images too: of most rows that is the line itself."""
    if not row.attached:
        return row.raw
    digest = blake2b(row.raw)
    for name, images in row.attached.items():
        for image in images:
            piece = image if isinstance(image, bytes) else image.encode("utf-8", "surrogatepass")
            digest.update(f"{name}:{len(piece)}:".encode() + piece)
    return digest.digest()


def find_images(
    fields: dict[str, Any], names: tuple[str, ...] | None, attached: Mapping[str, Images] = NONE_ATTACHED
) -> list[ImageReference]:
    """The images of these fields, in this order. Raises `RowError` where one holds something else."""
    references: list[ImageReference] = []
    for name in names if names is not None else (DEFAULT_IMAGE_FIELD,):
        for source in attached[name] if name in attached else _sources(fields.get(name)):
            if not isinstance(source, str | bytes) or not source:
                raise RowError("image", f"image field {name!r} holds {_kind(source)}, not a path or a list of paths")
            references.append(ImageReference(name, source))
    return references


def _sources(value: Any) -> Iterable[Any]:
    """What an image field of the row's JSON holds, in order."""
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        return images_in(value)
    if not isinstance(value, list):
        return (value,)
    return [as_source(one) if isinstance(one, str) and is_inline(one) else one for one in value]


def _question(fields: dict[str, Any], names: Fields) -> str | None:
    value = fields.get(names.question)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        return names.compose(fields, value) if names.compose is not None else value
    if not names.question_needed:
        return None
    if names.question not in fields:
        raise RowError("field", f"question field {names.question!r} is missing; {_has(fields)}")
    raise RowError("field", f"question field {names.question!r} is {_kind(value)}, not text")


def documents_of(fields: dict[str, Any], name: str) -> str | list[str]:
    """What the row's question is compared with: one text, or a list of them (also one that is written as a text, as in
    the cell of a table). Raises `RowError` where it is neither."""
    value = fields.get(name)
    if isinstance(value, str) and (listed := split_list(value.strip())) is not None:
        value = listed
    if isinstance(value, str) and value.strip():
        return value
    if not isinstance(value, list) or not value:
        lack = (
            f"is missing; {_has(fields)}" if name not in fields else f"is {_kind(value)}, not a text or a list of texts"
        )
        raise RowError("field", f"documents field {name!r} {lack}")
    for index, document in enumerate(value):
        if not isinstance(document, str) or not document.strip():
            raise RowError("field", f"documents field {name!r}[{index}] is {_kind(document)}, not text")
    return value


def check_batch_line(fields: dict[str, Any]) -> str:
    """Check a row that is a request already, and return its custom_id. Raises `RowError` with the field's name."""
    custom_id = fields.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id or "\n" in custom_id:
        raise RowError("field", f"custom_id is {_kind(custom_id)}, not text on one line")
    if fields.get("method") != "POST":
        raise RowError("field", f"method is {fields.get('method')!r}, not 'POST'")
    if not isinstance(fields.get("url"), str):
        raise RowError("field", f"url is {_kind(fields.get('url'))}, not text such as '/v1/chat/completions'")
    body = fields.get("body")
    if not isinstance(body, dict):
        raise RowError("field", f"body is {_kind(body)}, not an object")
    if not isinstance(body.get("model"), str):
        raise RowError("field", f"body.model is {_kind(body.get('model'))}, not text")
    endpoint = endpoint_at(fields["url"])
    if endpoint is not None and endpoint.shape == "chat":
        _check_messages(body)
    for names in endpoint.needs if endpoint is not None else ():
        if all(body.get(name) is None for name in names):
            raise RowError("field", f"body has no {' or '.join(map(repr, names))}, which {fields['url']} needs")
    return custom_id


def _check_messages(body: dict[str, Any]) -> None:
    """What every chat backend needs: vLLM's runner stops at the first line without, after the model was loaded."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RowError("field", f"body.messages is {_kind(messages)}, not a list of messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowError("field", f"body.messages[{index}] is not an object with a role")


def _kind(value: Any) -> str:
    if value is None:
        return "null or missing"
    if value in ("", [], {}):
        return "empty"
    if isinstance(value, str) and not value.strip():
        return "blank"
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _has(fields: dict[str, Any]) -> str:
    shown = ", ".join(list(fields)[:8]) + (", …" if len(fields) > 8 else "")
    return f"the row has {shown}" if fields else "the row is empty"
