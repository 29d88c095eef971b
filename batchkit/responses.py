"""A response line → response. The only judge of success.

Success is read off the status of the response (and, within a success, off the finish reason), never off the mere
absence of an `error`. The shapes that are known, and where they come from:

| shape | source |
|---|---|
| `response.status_code` 200, `response.body.choices` | OpenAI Batch API; vLLM run_batch 0.10 to 0.33 |
| `response` with a status, `body: null`, `error.error.message` | vLLM run_batch, a request that failed |
| the same with `error` a plain string | vLLM run_batch: `stream`, unknown url |
| `error: null`, the error inside `response.body`, status 4xx or 5xx | OpenAI, an HTTP failure |
| `response: null`, `error.code` batch_expired or batch_cancelled | OpenAI, batches that ended early |
| `response.status_code` 0 | OpenAI, seen by users: no connection |
| `response: null`, `error.code` inference_failed | AIBrix 0.8 |
| the completion itself as `response`, no status | vLLM 0.4 |
| `key` for `custom_id`; `response.candidates`, or `error` or `status` with a gRPC code | Gemini Batch API, as it is |

Bodies: chat completions (text, parts, tool calls, refusals), completions, responses, embeddings, score, rerank,
classify, pooling, moderations, transcriptions. Anything else is `failed`, and says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from hashlib import blake2b
from typing import Any, NamedTuple

import msgspec
import xxhash

from batchkit import bodies, faults
from batchkit.generated import Generated, Inline


class Verdict(StrEnum):
    """What became of a row. The first four are answers."""

    ANSWERED = "answered"
    TRUNCATED = "truncated"
    REFUSED = "refused"
    INVALID = "invalid"
    FAILED = "failed"
    EXPIRED = "expired"
    MISSING = "missing"
    PENDING = "pending"
    REJECTED = "rejected"
    CONFLICTING = "conflicting"


ANSWERS = frozenset({Verdict.ANSWERED, Verdict.TRUNCATED, Verdict.REFUSED, Verdict.INVALID})


class UnreadableLine(ValueError):  # noqa: N818  # it is a finding about a line, and is counted, not reported
    """A line that is no JSON object, or has no text as `custom_id`: cut in half, or no response at all."""


class Response(msgspec.Struct, frozen=True, gc=False):
    """One response, judged. `verdict` is one of answered, truncated, refused, failed and expired.

    `answer` is the first choice's text; for embeddings a vector or a list of vectors, for scores a number or a list of
    them, else the JSON value; None where there is none. `message` is the error or the reason of a refusal.
    `passing`: the same request may succeed if it is sent again. `engine_died`: the line says no more than that the
    engine ended before it came to this request. `images` are those that the model made, which are not in `answer`;
    `segments` as in `generated.Said`.
    """

    custom_id: str
    verdict: Verdict
    answer: Any = None
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    model: str | None = None
    message: str | None = None
    code: str | int | None = None
    passing: bool = False
    engine_died: bool = False
    images: tuple[Generated, ...] = ()
    segments: int | None = None


Keep = Callable[[Inline], str]
"""Puts the bytes of an image aside, and returns the name by which they are found again."""


class _Message(msgspec.Struct, gc=False):
    content: str
    refusal: str | None = None
    images: Any = None


class _Choice(msgspec.Struct, gc=False):
    message: _Message
    finish_reason: str | None


class _Body(msgspec.Struct, gc=False):
    choices: list[_Choice]
    model: str | None = None
    usage: dict[str, Any] | None = None


class _Returned(msgspec.Struct, gc=False):
    status_code: int
    body: _Body


class _Line(msgspec.Struct, gc=False):
    custom_id: str
    response: _Returned


_decode_common = msgspec.json.Decoder(_Line).decode
_encode_sorted = msgspec.json.Encoder(order="deterministic").encode
_decode_any = msgspec.json.Decoder().decode
UNKNOWN = "a response of unknown shape"


def parse(line: bytes, keep: Keep | None = None) -> Response:
    """Judge one line. Raises `UnreadableLine` where it is no JSON object with a `custom_id`; nothing else.

    `keep` takes the images that a model made: without it they are only told apart, so that no response is large.
    """
    try:
        common = _decode_common(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _parse_any(line, keep)
    body = common.response.body
    if common.response.status_code == 200 and body.choices:
        choice = body.choices[0]
        message = choice.message
        plain = message.content and not message.refusal and not message.images and "data:image/" not in message.content
        if choice.finish_reason == "stop" and plain:
            return Response(common.custom_id, Verdict.ANSWERED, message.content, "stop", body.usage, body.model)
    return _parse_any(line, keep)


def _parse_any(line: bytes, keep: Keep | None) -> Response:
    fields = decode(line)
    if not isinstance(fields, dict):
        raise UnreadableLine("not a JSON object")
    returned, error = fields.get("response"), fields.get("error")
    if "custom_id" not in fields and "key" in fields:
        custom_id, error = fields["key"], error or fields.get("status")
    else:
        custom_id = fields.get("custom_id")
    if not isinstance(custom_id, str):
        raise UnreadableLine("no custom_id")
    if ("method" in fields or "request" in fields) and "response" not in fields and "error" not in fields:
        raise UnreadableLine("a request, not a response")
    if isinstance(returned, dict):
        status = faults.number(returned.get("status_code"))
        body = returned.get("body") if "body" in returned or status is not None else returned
        if status is None and not (error is None or error == {}):
            return _failure(custom_id, None, error, body)
        if status is None or 200 <= status < 300:
            return _success(custom_id, body, error, keep)
        return _failure(custom_id, status, error, body)
    return _failure(custom_id, None, error, returned)


def _success(custom_id: str, body: Any, error: Any, keep: Keep | None) -> Response:
    found = bodies.read(body)
    if found.kind == "none":
        fault = faults.read(None, error, body)
        return Response(
            custom_id,
            Verdict.EXPIRED if fault.expired else Verdict.FAILED,
            finish_reason=found.finish_reason,
            usage=found.usage,
            model=found.model,
            message=fault.message or found.message or UNKNOWN,
            code=fault.code,
            passing=fault.passing or found.passing,
            engine_died=fault.engine_died,
        )
    return Response(
        custom_id=custom_id,
        verdict=Verdict(found.kind),
        answer=found.answer,
        finish_reason=found.finish_reason,
        usage=found.usage,
        model=found.model,
        message=found.message,
        images=tuple(_generated(image, keep) for image in found.images),
        segments=found.segments,
    )


def _generated(image: Inline, keep: Keep | None) -> Generated:
    digest = xxhash.xxh3_128_hexdigest(image.text.encode("utf-8", "surrogatepass"))
    if image.link:
        return Generated(digest, link=image.text)
    return Generated(digest, kept=keep(image) if keep is not None else None)


def _failure(custom_id: str, status: int | None, error: Any, body: Any) -> Response:
    fault = faults.read(status, error, body)
    return Response(
        custom_id,
        Verdict.EXPIRED if fault.expired else Verdict.FAILED,
        message=fault.message or UNKNOWN,
        code=fault.code,
        passing=fault.passing,
        engine_died=fault.engine_died,
    )


def decode(line: bytes) -> Any:
    """Decode JSON, also with NaN, half a surrogate pair, a byte order mark or broken UTF-8: what it says may have been
    paid for. Raises `UnreadableLine`."""
    try:
        return _decode_any(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    except RecursionError as exc:
        raise UnreadableLine("nested too deeply") from exc
    try:
        return _clean(json.loads(line.decode("utf-8", "replace").lstrip("\ufeff")))
    except (ValueError, RecursionError) as exc:
        raise UnreadableLine(f"not JSON: {exc}") from exc


def is_json(data: bytes) -> bool:
    """Whether `decode` can read it."""
    try:
        decode(data)
    except UnreadableLine:
        return False
    return True


def _clean(value: Any) -> Any:
    """Replace half surrogate pairs, which UTF-8 cannot hold, so that the value can be written again."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_clean(entry) for entry in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(entry) for key, entry in value.items()}
    return value


class Chosen(NamedTuple):
    """Which response counts. `conflicts` are other answers of the same attempt; None for `response`: there was none."""

    response: Response | None
    attempt: int | None
    conflicts: list[Response]


def choose(candidates: list[tuple[int, Response]]) -> Chosen:
    """Pick among all responses to one request: (attempt, response) pairs in the order of the files.

    An answer beats an error. Of two answers from different attempts the later attempt's wins; two equal ones are one;
    of different ones within one attempt the first is kept and the others are listed. Of errors the last counts.
    """
    if len(candidates) == 1:  # the usual case
        return Chosen(candidates[0][1], candidates[0][0], [])
    answers = [pair for pair in candidates if pair[1].verdict in ANSWERS]
    if not answers:
        if not candidates:
            return Chosen(None, None, [])
        attempt, response = max(enumerate(candidates), key=lambda entry: (entry[1][0], entry[0]))[1]
        return Chosen(response, attempt, [])
    latest = max(attempt for attempt, _ in answers)
    distinct: dict[bytes, Response] = {}
    for attempt, response in answers:
        if attempt == latest:
            distinct.setdefault(gist(response), response)
    first, *others = distinct.values()
    return Chosen(first, latest, others)


def gist(response: Response) -> bytes:
    """Equal for answers that say and show the same; their usage and ids may differ."""
    shown = [image.digest for image in response.images]
    said = (response.verdict, response.answer, response.message, shown)
    return blake2b(_encode_sorted(said), digest_size=16).digest()
