"""What a response that is no success says of its cause. Serves `responses` alone.

Hosts differ in where they put an error (beside the response, inside its body, nested once more) and in what they say.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec


class Fault(NamedTuple):
    """`message` is None where the line says nothing. `passing` and `engine_died` are as in `Response`; `expired`: the
    batch ended before the request was run."""

    message: str | None
    code: str | int | None
    expired: bool = False
    passing: bool = False
    engine_died: bool = False


# What a vLLM engine's death looks like from outside. v1: the text of EngineDeadError (vllm/v1/engine/exceptions.py,
# 0.10 to 0.33), which run_batch and the server hand on with status 500. v0 (up to 0.10): AsyncEngineDeadError
# (engine/async_llm_engine.py) and MQEngineDeadError (engine/multiprocessing/client.py). EngineGenerateError, whose
# text is empty, concerns one request and is no death.
_ENGINE_DIED = re.compile(
    r"\s*(?:[\w.]*EngineDeadError\b"
    r"|EngineCore encountered an issue\b"
    r"|Background loop (?:has errored already|is stopped)\b"
    r"|Engine loop is not running\b)"
)
_BATCH_ENDED = frozenset({"batch_expired", "batch_cancelled", "batch_canceled", "expired", "cancelled", "canceled"})
# Words that stand where a status is missing (`error.code` or `error.type`); request_timeout is OpenAI's, in batches.
_PASSING_WORDS = re.compile(
    r"time_?out|rate_?limit|overloaded|unavailable|server_?error|internal_?error|connection", re.IGNORECASE
)

# Codes of google.rpc.Status, where a status should be (grpc.github.io/grpc/core/md_doc_statuscodes.html): unknown,
# deadline exceeded, resource exhausted, aborted, internal and unavailable may pass. No HTTP status is that small.
_GRPC_CODES = range(1, 17)
_GRPC_PASSING = frozenset({2, 4, 8, 10, 13, 14})
# What an error quotes of an image is left out: base64 belongs nowhere but into requests.
_BASE64 = re.compile(r"[A-Za-z0-9+/=_-]{200,}")


def read(status: int | None, error: Any, body: Any) -> Fault:
    """Read the error of a line whose HTTP status is `status`, None where it has none. Never raises."""
    message, code, kind = _describe(error, body)
    if message is not None and len(message) > 200:
        message = _BASE64.sub("…", message)
    if status is None and isinstance(code, str) and code.lower() in _BATCH_ENDED:
        return Fault(message, code, expired=True, passing=True)
    known = status if status is not None else number(code)
    died = (known is None or known >= 500) and message is not None and _ENGINE_DIED.match(message) is not None
    if message is None and known is not None:
        message = f"status {known} without a message"
    passing = died or _may_pass(status, known, (code, kind))
    return Fault(message, code if code is not None else status, passing=passing, engine_died=died)


def _may_pass(status: int | None, known: int | None, words: tuple[Any, ...]) -> bool:
    if known is None:
        return any(isinstance(word, str) and _PASSING_WORDS.search(word) for word in words)
    if status is None and known in _GRPC_CODES:
        return known in _GRPC_PASSING
    return known in (0, 408, 409, 425, 429) or known >= 500


def _describe(error: Any, body: Any) -> tuple[str | None, str | int | None, str | None]:
    """Message, code and type of the error, from wherever the line has them."""
    places = [error, body] if not isinstance(body, dict) else [error, body.get("error"), body]
    for place in places:
        inner = place.get("error", place) if isinstance(place, dict) else place
        if isinstance(inner, str) and inner.strip():
            return inner, None, None
        if not isinstance(inner, dict) or not inner:
            continue
        code, kind = inner.get("code"), inner.get("type")
        message = inner.get("message") or inner.get("detail")
        if message is not None and not isinstance(message, str):
            message = msgspec.json.encode(message).decode()
        if message or code:
            return (
                message or f"error {code}",
                code if isinstance(code, (str, int)) else None,
                kind if isinstance(kind, str) else None,
            )
    return None, None, None


def number(value: Any) -> int | None:
    """A status, also where a host writes it as text. None where there is none."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    return int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,3}", value) else None
