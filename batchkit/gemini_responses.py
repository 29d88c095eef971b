"""A line of a Gemini batch result → a line of OpenAI batch output. No network, no clock, no files.

`{"key", "response": {GenerateContentResponse}}`, or with `error` or `status` (google.rpc.Status) for `response`
(ai.google.dev/gemini-api/docs/batch-api, ai.google.dev/api/generate-content; google-genai 3.4.0), spelled in camelCase
or snake_case, becomes `{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}` with a chat
completion as `body`, so that `responses.parse` judges both lines alike.

Left out, since a chat completion has no place for it: safety ratings, citations, grounding, images among the thoughts,
and signatures of thoughts.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import msgspec

from batchkit import faults

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode

# Finish reasons (google-genai 3.4.0, `types.FinishReason`). What stands in none of these is a failure: the model was
# broken off or went astray, and what text there is, is no answer.
_FINISHED = {"STOP": "stop", "MAX_TOKENS": "length", "CONTINUATION": "length", "FINISH_REASON_UNSPECIFIED": None}
_DECLINED = frozenset({
    "SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY",
    "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION", "ESCALATION", "MODEL_ARMOR",
})  # fmt: skip

# google.rpc.Code → name and HTTP status, as google/rpc/code.proto has them, but for three errors that last and would
# read as passing with their own status: ALREADY_EXISTS (409), UNIMPLEMENTED (501) and DATA_LOSS (500).
_RPC = {
    1: ("CANCELLED", 499), 2: ("UNKNOWN", 500), 3: ("INVALID_ARGUMENT", 400), 4: ("DEADLINE_EXCEEDED", 504),
    5: ("NOT_FOUND", 404), 6: ("ALREADY_EXISTS", 400), 7: ("PERMISSION_DENIED", 403), 8: ("RESOURCE_EXHAUSTED", 429),
    9: ("FAILED_PRECONDITION", 400), 10: ("ABORTED", 409), 11: ("OUT_OF_RANGE", 400), 12: ("UNIMPLEMENTED", 400),
    13: ("INTERNAL", 500), 14: ("UNAVAILABLE", 503), 15: ("DATA_LOSS", 400), 16: ("UNAUTHENTICATED", 401),
}  # fmt: skip
_RPC_NAMES = dict(_RPC.values())
# The job ended before the request was run: OpenAI's words for it, which the verdict `expired` goes by.
_ENDED = {"CANCELLED": "batch_cancelled", "EXPIRED": "batch_expired"}


def translate(line: bytes) -> bytes:
    """One line of a result file, without a line feed. What cannot be read, or is no result of Gemini's, comes back as
    it is. Never raises."""
    try:
        fields = _read(line)
    except (ValueError, RecursionError):
        return line
    if not isinstance(fields, dict) or "custom_id" in fields or not isinstance(fields.get("key"), str):
        return line
    if not {"response", "error", "status"} & fields.keys():
        return line
    done = {"id": None, "custom_id": fields["key"], **_outcome(fields)}
    try:
        return _encode(done)
    except (ValueError, RecursionError):  # half a surrogate pair, which UTF-8 cannot hold, but JSON can
        return json.dumps(done).encode()


def _read(line: bytes) -> Any:
    try:
        return _decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return json.loads(line)  # takes NaN and half a surrogate pair


def _outcome(fields: dict[str, Any]) -> dict[str, Any]:
    """`response` and `error` of the translated line."""
    returned = fields.get("response")
    error = fields.get("error") or fields.get("status")
    if not error and isinstance(returned, dict) and not _get(returned, "candidates"):
        error = returned.get("error")
    if error and not (isinstance(error, dict) and isinstance(returned, dict) and error.get("code") == 0):
        return _failure(error)
    if not isinstance(returned, dict):
        return {"response": None, "error": None}
    response_id = _text(_get(returned, "responseId"))
    return {
        "response": {"status_code": 200, "request_id": response_id, "body": _completion(returned, response_id)},
        "error": None,
    }


def _failure(error: Any) -> dict[str, Any]:
    """google.rpc.Status with its own codes or with HTTP's. `code` stays as it was."""
    if not isinstance(error, dict):
        return {"response": None, "error": {"code": None, "message": error if isinstance(error, str) else None}}
    code, message = error.get("code"), error.get("message")
    number = faults.number(code)
    words = (error.get("status"), code if number is None else None)
    name = next((word.upper() for word in words if isinstance(word, str)), "")
    name = name.removeprefix("JOB_STATE_").removeprefix("BATCH_STATE_").removeprefix("BATCH_")
    http = _RPC_NAMES.get(name)
    if number in _RPC:
        name, http = _RPC[number]
    elif number is not None and 400 <= number < 600:
        http = number
    if name in _ENDED or http == 499:
        ended = _ENDED.get(name, "batch_cancelled")
        return {"response": None, "error": {"code": ended, "message": message or f"the job has ended: {name or http}"}}
    if http is None:
        return {"response": None, "error": error}
    body = {"error": {"message": message, "type": name or None, "code": code}}
    if details := error.get("details"):
        body["error"]["details"] = details
    return {"response": {"status_code": http, "request_id": "", "body": body}, "error": None}


def _completion(returned: dict[str, Any], response_id: str) -> dict[str, Any]:
    choices = [_choice(candidate, position) for position, candidate in enumerate(_dicts(_get(returned, "candidates")))]
    if not choices:
        feedback = _get(returned, "promptFeedback")
        reason = _get(feedback, "blockReason") if isinstance(feedback, dict) else None
        if isinstance(reason, str):
            message = {"role": "assistant", "content": None, "refusal": f"the prompt was blocked: {reason}"}
            choices = [{"index": 0, "message": message, "finish_reason": "content_filter"}]
    body = {
        "id": response_id,
        "object": "chat.completion",
        "created": _seconds(_get(returned, "createTime")),
        "model": _get(returned, "modelVersion"),
        "choices": choices,
    }
    if (usage := _usage(_get(returned, "usageMetadata"))) is not None:
        body["usage"] = usage
    return body


def _choice(candidate: dict[str, Any], position: int) -> dict[str, Any]:
    content = candidate.get("content")
    message = _message(_dicts(content.get("parts")) if isinstance(content, dict) else [])
    finish = _get(candidate, "finishReason")
    word = finish.upper() if isinstance(finish, str) else "FINISH_REASON_UNSPECIFIED"
    if word in _DECLINED:
        message["refusal"] = f"declined: {finish}"
        reason: str | None = "content_filter"
    else:
        # `error: …` is how `bodies` knows an answer that broke off; it names Gemini's own reason.
        reason = _FINISHED.get(word, f"error: {finish}")
    index = candidate.get("index")
    choice = {"index": index if isinstance(index, int) else position, "message": message, "finish_reason": reason}
    if isinstance(logprobs := _get(candidate, "logprobsResult"), dict):
        choice["logprobs"] = _logprobs(logprobs)
    return choice


def _message(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Text alone becomes a string; where something else is among it, all becomes a list of content parts."""
    spoken = [part for part in parts if not part.get("thought")]
    texts = [text for part in spoken if isinstance(text := part.get("text"), str)]
    content: Any = "".join(texts) if texts else None
    entries = [entry for part in spoken if (entry := _entry(part)) is not None]
    if any(entry["type"] != "text" for entry in entries):
        content = entries
    message: dict[str, Any] = {"role": "assistant", "content": content}
    thoughts = [text for part in parts if part.get("thought") and isinstance(text := part.get("text"), str)]
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    return message


def _entry(part: dict[str, Any]) -> dict[str, Any] | None:
    """A content part; one that OpenAI has no word for is kept as it is, and named so. None: nothing but a signature."""
    if isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    blob = _get(part, "inlineData")
    if isinstance(blob, dict) and isinstance(blob.get("data"), str):
        media_type = _text(_get(blob, "mimeType"))
        url = f"data:{media_type};base64,{blob['data']}"
        if media_type.startswith("image/"):
            return {"type": "image_url", "image_url": {"url": url}}
        return {"type": "file", "file": {"file_data": url}}
    if not part.keys() - {"thought", "thoughtSignature", "thought_signature"}:
        return None
    return {"type": "gemini_part", "gemini_part": part}


def _usage(counts: Any) -> dict[str, Any] | None:
    if not isinstance(counts, dict):
        return None
    names = ("promptTokenCount", "candidatesTokenCount", "thoughtsTokenCount", "totalTokenCount",
             "cachedContentTokenCount")  # fmt: skip
    prompt, answer, thoughts, total, cached = (_get(counts, name) or 0 for name in names)
    if not all(isinstance(count, int) for count in (prompt, answer, thoughts, total, cached)):
        return None
    # Gemini counts thoughts beside the answer, and cached tokens within the prompt (#UsageMetadata).
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer + thoughts,
        "total_tokens": total,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": thoughts},
    }


def _logprobs(result: dict[str, Any]) -> dict[str, Any]:
    """LogprobsResult: the chosen token of each step, and beside it the likeliest ones of the step."""
    chosen = _dicts(_get(result, "chosenCandidates"))
    steps = [_dicts(step.get("candidates")) for step in _dicts(_get(result, "topCandidates"))]
    steps += [[] for _ in range(len(chosen) - len(steps))]
    return {
        "content": [
            {**_token(token), "top_logprobs": [_token(other) for other in step]}
            for token, step in zip(chosen, steps, strict=False)
        ]
    }


def _token(entry: dict[str, Any]) -> dict[str, Any]:
    # Proto JSON leaves out a number that is 0, and the logarithm of a sure token is 0.
    return {"token": _text(entry.get("token")), "logprob": _get(entry, "logProbability") or 0, "bytes": None}


def _get(fields: dict[str, Any], name: str) -> Any:
    """A member by its name in camelCase, in either spelling."""
    if name in fields:
        return fields[name]
    return fields.get("".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name))


def _dicts(values: Any) -> list[dict[str, Any]]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _seconds(stamp: Any) -> int:
    """Seconds since 1970 of an RFC 3339 time; 0 where there is none, since `created` must be a number."""
    try:
        moment = datetime.fromisoformat(stamp)
    except (TypeError, ValueError):
        return 0
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
