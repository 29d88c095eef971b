"""Task file → rows → tasks.

A row is one line of the task file, kept byte for byte. A task is what batchkit needs of it: who it is, its images,
its question.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from batchkit.errors import InputError, RowError
from batchkit.storage import is_plain_local, open_read

BOM = b"\xef\xbb\xbf"
BATCH_KEYS = frozenset({"custom_id", "method", "url", "body"})
"""The keys of a request in OpenAI batch format (platform.openai.com/docs/guides/batch)."""

COUNTED_BYTES = 2_000_000_000
"""Files up to this size are counted before they are read: that takes a second."""

DEFAULT_IMAGE_FIELD = "image"
DEFAULT_ID_FIELD = "id"

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


class Row(NamedTuple):
    """`position` counts rows from 0, `line` lines from 1; `raw` has no line feed, `end` is the offset behind it."""

    position: int
    line: int
    raw: bytes
    end: int


class Place(NamedTuple):
    """A point between two lines of a task file: what comes next."""

    position: int = 0
    line: int = 1
    offset: int = 0


FILE_START = Place()


class ImageReference(NamedTuple):
    """An image of a row: the field that names it, and its path or URL as the row has it."""

    field: str
    source: str


class Task(NamedTuple):
    """The validated view of a row. `images` are in the order of the fields."""

    custom_id: str
    fields: dict[str, Any]
    images: list[ImageReference]
    question: str | None


@dataclass(frozen=True)
class Fields:
    """Which fields of a row mean what. None for `images` or `ids` is the default, used where a row has it."""

    images: tuple[str, ...] | None = None
    question: str = "question"
    ids: tuple[str, ...] | None = None
    question_needed: bool = True


def read_rows(uri: str, start: Place = FILE_START) -> Iterator[Row]:
    """The rows of a task file from `start` on. Blank lines are not rows; a byte order mark is not part of the first."""
    with open_read(uri) as stream:
        position, number, offset = start if is_plain_local(uri) else FILE_START
        if offset:
            stream.seek(offset)
        for line in stream:
            offset += len(line)
            raw = line[:-1] if line.endswith(b"\n") else line
            if number == 1 and raw.startswith(BOM):
                raw = raw[len(BOM) :]
            if raw.strip():
                if position >= start.position:  # else: a compressed or remote file, read again from its beginning
                    yield Row(position, number, raw, offset)
                position += 1
            number += 1


def count_rows(uri: str) -> int | None:
    """About how many rows a task file has (blank lines count, too), for a progress bar.

    None where counting would take long: compressed, remote or large files.
    """
    if not is_plain_local(uri) or Path(uri).stat().st_size > COUNTED_BYTES:
        return None
    with open_read(uri) as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))


def make_custom_id(position: int, identity: bytes) -> str:
    """Position and digest: `17-5f2c…`, unique in a run, the same every time, at most 64 of [A-Za-z0-9_-]."""
    return f"{position}-{blake2b(identity, digest_size=8).hexdigest()}"


def parse_object(raw: bytes) -> dict[str, Any]:
    """Decode a row. Raises `RowError` where it is not JSON (RFC 8259: no NaN) or not an object."""
    try:
        value = _decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise RowError("json", f"not valid JSON: {exc}") from exc
    except RecursionError as exc:
        raise RowError("json", "not usable JSON: nested too deeply") from exc
    if not isinstance(value, dict):
        raise RowError("object", f"not a JSON object but {_kind(value)}")
    return value


def to_task(row: Row, names: Fields) -> Task:
    """Raises `RowError` where a field is missing or of the wrong kind."""
    fields = parse_object(row.raw)
    return Task(
        custom_id=make_custom_id(row.position, _identity(row, fields, names.ids)),
        fields=fields,
        images=find_images(fields, names.images),
        question=_question(fields, names),
    )


def _identity(row: Row, fields: dict[str, Any], ids: tuple[str, ...] | None) -> bytes:
    if ids is None:
        return _encode(fields[DEFAULT_ID_FIELD]) if DEFAULT_ID_FIELD in fields else row.raw
    missing = [name for name in ids if fields.get(name) is None]
    if missing:
        raise RowError("field", f"id field {missing[0]!r} is missing; {_has(fields)}")
    return _encode([fields[name] for name in ids])


def find_images(fields: dict[str, Any], names: tuple[str, ...] | None) -> list[ImageReference]:
    """The images of these fields, in this order. Raises `RowError` where one holds something else."""
    references: list[ImageReference] = []
    for name in names if names is not None else (DEFAULT_IMAGE_FIELD,):
        value = fields.get(name)
        if value is None or value == "":
            continue
        for source in value if isinstance(value, list) else [value]:
            if not isinstance(source, str) or not source:
                raise RowError("image", f"image field {name!r} holds {_kind(source)}, not a path or a list of paths")
            references.append(ImageReference(name, source))
    return references


def _question(fields: dict[str, Any], names: Fields) -> str | None:
    value = fields.get(names.question)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value
    if not names.question_needed:
        return None
    if names.question not in fields:
        raise RowError("field", f"question field {names.question!r} is missing; {_has(fields)}")
    raise RowError("field", f"question field {names.question!r} is {_kind(value)}, not text")


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
    if fields["url"] == "/v1/chat/completions":
        _check_messages(body)
    return custom_id


def _check_messages(body: dict[str, Any]) -> None:
    """What every chat backend needs: vLLM's runner stops at the first line without, after the model was loaded."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RowError("field", f"body.messages is {_kind(messages)}, not a list of messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowError("field", f"body.messages[{index}] is not an object with a role")


def first_row(uri: str) -> dict[str, Any] | None:
    """The first row that is a JSON object, None for a file without rows.

    Raises `InputError` where the beginning of the file shows that it is of another kind (CSV, one JSON array, binary).
    A few bad rows do not: they are rejected one by one.
    """
    first: bytes | None = None
    for row in itertools.islice(read_rows(uri), 100):
        if first is None:
            first = row.raw.strip()
            _refuse_other_kind(uri, first)
        try:
            return parse_object(row.raw)
        except RowError:
            continue
    if first is None:
        return None
    if first.startswith(b"["):
        raise InputError(f"{uri}: holds a JSON array, not one JSON object a line", hint=_jq(".[]", uri))
    raise InputError(
        f"{uri}: is not JSONL: line 1 begins with {first[:40].decode('utf-8', 'replace')!r}", hint=FROM_CSV
    )


FROM_CSV = (
    "a task file has one JSON object a line; a CSV becomes one with: python3 -c 'import csv, json, sys; "
    "[print(json.dumps(row)) for row in csv.DictReader(sys.stdin)]' < FILE.csv > tasks.jsonl"
)


def _refuse_other_kind(uri: str, first: bytes) -> None:
    """Refuse what would only look like many bad rows, or have a few good ones by chance."""
    if b"\x00" in first[:200] or first.startswith((b"PAR1", b"PK\x03\x04", b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):
        raise InputError(
            f"{uri}: is a binary file, not JSONL",
            hint="a task file has one JSON object a line; a compressed one is named .gz, .bz2, .xz or .zst",
        )
    if first == b"[":
        raise InputError(f"{uri}: holds a JSON array, not one JSON object a line", hint=_jq(".[]", uri))
    if first == b"{":
        raise InputError(f"{uri}: holds JSON spread over several lines, not one object a line", hint=_jq(".", uri))


def _jq(program: str, uri: str) -> str:
    return f"jq -c '{program}' {shlex.quote(uri)} > tasks.jsonl"


def _kind(value: Any) -> str:
    if value is None:
        return "null or missing"
    if value in ("", [], {}):
        return "empty"
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _has(fields: dict[str, Any]) -> str:
    shown = ", ".join(list(fields)[:8]) + (", …" if len(fields) > 8 else "")
    return f"the row has {shown}" if fields else "the row is empty"
