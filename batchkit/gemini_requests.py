"""An OpenAI chat-completions line → a line for Gemini's Batch API. No network, no clock, no files.

`{"custom_id", "method", "url", "body"}` becomes `{"key", "request": {"contents", "system_instruction",
"generation_config", "safety_settings"}}`, in the spelling of ai.google.dev/gemini-api/docs/batch-api. The fields of
`request` are GenerateContentRequest's (ai.google.dev/api/generate-content; google-genai 3.4.0, `types.Content` and
`types.GenerationConfig`). The model is the job's, not the line's, and is read only where an option depends on it.

Nothing is dropped in silence: a key without a counterpart raises `RowError` with code "unmapped" and the key's path.
A key whose value is null counts as absent. Four keys ask for nothing that Gemini does not do anyway, and are taken:
`stream: false`, `n: 1`, and the `name` and `strict` of a JSON schema (Gemini always holds to the schema).
"""

from __future__ import annotations

import re
from posixpath import splitext
from typing import Any
from urllib.parse import urlsplit

import msgspec

from batchkit.errors import RowError
from batchkit.limits import CHAT

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode

_INTEGERS = {"max_tokens": "max_output_tokens", "max_completion_tokens": "max_output_tokens", "top_k": "top_k",
             "seed": "seed"}  # fmt: skip
_NUMBERS = frozenset({"temperature", "top_p", "presence_penalty", "frequency_penalty"})
_BODY = frozenset({
    "model", "messages", "n", "stream", "stop", "logprobs", "top_logprobs", "response_format", "reasoning_effort",
    "thinking_budget", "safety_settings", *_INTEGERS, *_NUMBERS,
})  # fmt: skip

# What Gemini's own OpenAI endpoint makes of reasoning_effort (ai.google.dev/gemini-api/docs/openai#thinking): the first
# family that fits counts. 2.5 Pro cannot be kept from thinking, and the Pro models of Gemini 3 know no `minimal`.
_BUDGETS = {"minimal": 1024, "low": 1024, "medium": 8192, "high": 24576}
_LEVELS = {"minimal": "MINIMAL", "low": "LOW", "medium": "MEDIUM", "high": "HIGH"}
_FAMILIES: tuple[tuple[re.Pattern[str], str, dict[str, Any]], ...] = (
    (re.compile(r"(?:^|/)gemini-2\.5-pro\b"), "thinking_budget", _BUDGETS),
    (re.compile(r"(?:^|/)gemini-2\.5\b"), "thinking_budget", {"none": 0, **_BUDGETS}),
    (re.compile(r"(?:^|/)gemini-3(?:\.[0-9]+)?-pro\b"), "thinking_level", {**_LEVELS, "minimal": "LOW"}),
    (re.compile(r"(?:^|/)gemini-3\b"), "thinking_level", _LEVELS),
)

_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+);base64,", re.IGNORECASE | re.ASCII)
# Not `mimetypes`: it reads the tables of the machine, and one request would differ from another's.
_MEDIA_TYPES = {
    ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp", ".gif": "image/gif",
    ".heic": "image/heic", ".heif": "image/heif", ".bmp": "image/bmp", ".pdf": "application/pdf",
}  # fmt: skip
# For the whole request: the resolution of a single part is experimental and in v1alpha only
# (ai.google.dev/gemini-api/docs/media-resolution).
_RESOLUTIONS = {"auto": None, "low": "MEDIA_RESOLUTION_LOW", "high": "MEDIA_RESOLUTION_HIGH"}


def translate(line: bytes) -> bytes:
    """One request line, without a line feed on either side. Raises `RowError` where it cannot be said to Gemini."""
    try:
        value = _decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise RowError("unmapped", f"the line is not JSON: {exc}") from exc
    fields = _members(value, "", frozenset({"custom_id", "method", "url", "body"}))
    key = _string(fields.get("custom_id"), "custom_id")
    if fields.get("method", "POST") != "POST":
        raise _lacks("method", "method but POST")
    if fields.get("url", CHAT) != CHAT:
        raise _lacks("url", f"counterpart of any url but {CHAT}")
    return _encode({"key": key, "request": _request(fields.get("body"))})


def check(body: dict[str, Any]) -> None:
    """Raise what `translate` raises for a line with this body, which needs its messages too."""
    _request(body)


def _request(value: Any) -> dict[str, Any]:
    body = _members(value, "body", _BODY)
    model = _string(body.get("model", ""), "body.model")
    if body.get("n", 1) != 1 or isinstance(body.get("n"), bool):
        raise _lacks("body.n", "more than one choice")
    if body.get("stream", False) is not False:
        raise _lacks("body.stream", "streams")
    talk = _Conversation(body.get("messages"))
    request: dict[str, Any] = {"contents": talk.contents}
    if talk.system:
        request["system_instruction"] = {"parts": talk.system}
    config = _parameters(body) | _logprobs(body) | _format(body) | _thinking(body, model) | talk.media_resolution()
    if config:
        request["generation_config"] = config
    if "safety_settings" in body:
        request["safety_settings"] = _safety(body["safety_settings"])
    return request


class _Conversation:
    """The messages of a body, as `contents` and the parts of the system instruction."""

    def __init__(self, messages: Any) -> None:
        self.contents: list[dict[str, Any]] = []
        self.system: list[dict[str, Any]] = []
        self._details: list[tuple[str, str | None]] = []  # of each image: where it stands, and its resolution
        for index, message in enumerate(_list(messages, "body.messages")):
            self._add(message, f"body.messages[{index}]")
        if not self.contents:
            raise _lacks("body.messages", "request without a message of the user")

    def media_resolution(self) -> dict[str, Any]:
        if not self._details:
            return {}
        first = self._details[0][1]
        for path, resolution in self._details:
            if resolution != first:
                raise _lacks(path, "detail of single images, only one for all images of a request")
        return {"media_resolution": first} if first is not None else {}

    def _add(self, value: Any, path: str) -> None:
        message = _members(value, path, frozenset({"role", "content"}))
        role = message.get("role")
        parts = self._parts(message.get("content"), f"{path}.content", images=role == "user")
        if role in ("system", "developer"):
            if self.contents:
                raise _lacks(path, "system message after another message")
            self.system += parts
        elif role in ("user", "assistant"):
            self.contents.append({"role": "user" if role == "user" else "model", "parts": parts})
        else:
            raise _lacks(f"{path}.role", f"role {role!r}")

    def _parts(self, content: Any, path: str, *, images: bool) -> list[dict[str, Any]]:
        if isinstance(content, str):
            parts: list[dict[str, Any]] = [{"text": content}]
        else:
            entries = _list(content, path)
            parts = [self._part(entry, f"{path}[{index}]", images=images) for index, entry in enumerate(entries)]
        if not any(part.get("text", True) for part in parts):
            raise _lacks(path, "message without content")
        return parts

    def _part(self, value: Any, path: str, *, images: bool) -> dict[str, Any]:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind == "text":
            return {"text": _string(_members(value, path, frozenset({"type", "text"})).get("text"), f"{path}.text")}
        if kind != "image_url":
            raise _lacks(f"{path}.type", f"content part {kind!r}")
        if not images:
            raise _lacks(f"{path}.image_url", "image outside of the user's messages")
        return self._image(_members(value, path, frozenset({"type", "image_url"})).get("image_url"), path)

    def _image(self, value: Any, path: str) -> dict[str, Any]:
        image = _members(value, f"{path}.image_url", frozenset({"url", "detail"}))
        detail = image.get("detail", "auto")
        if not isinstance(detail, str) or detail not in _RESOLUTIONS:
            raise _lacks(f"{path}.image_url.detail", f"detail {detail!r}")
        self._details.append((f"{path}.image_url.detail", _RESOLUTIONS[detail]))
        path += ".image_url.url"
        return _media(_string(image.get("url"), path), path)


def _media(url: str, path: str) -> dict[str, Any]:
    if url[:5].lower() == "data:":
        found = _DATA_URL.match(url)
        if found is None or found.end() == len(url):
            raise _lacks(path, "data URL but data:TYPE;base64,DATA")
        return {"inline_data": {"mime_type": found[1], "data": url[found.end() :]}}
    try:
        parts = urlsplit(url)
    except ValueError as exc:
        raise _wrong(path, f"is no URL: {exc}") from exc
    if parts.scheme not in ("https", "gs"):
        raise _lacks(path, "URL but data:, https:// and gs://")
    media_type = _MEDIA_TYPES.get(splitext(parts.path)[1].lower())
    if media_type is None:
        raise _lacks(path, "URL whose ending does not tell the media type")
    return {"file_data": {"file_uri": url, "mime_type": media_type}}


def _parameters(body: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for name, theirs in _INTEGERS.items():
        if name in body:
            value = _integer(body[name], f"body.{name}")
            if config.setdefault(theirs, value) != value:
                raise _wrong(f"body.{name}", "differs from body.max_tokens")
    for name in sorted(_NUMBERS & body.keys()):
        if not isinstance(body[name], (int, float)) or isinstance(body[name], bool):
            raise _wrong(f"body.{name}", "must be a number")
        config[name] = body[name]
    if "stop" in body:
        stop = [body["stop"]] if isinstance(body["stop"], str) else _list(body["stop"], "body.stop")
        config["stop_sequences"] = [_string(text, f"body.stop[{index}]") for index, text in enumerate(stop)]
    return config


def _logprobs(body: dict[str, Any]) -> dict[str, Any]:
    wanted = body.get("logprobs", False)
    if not isinstance(wanted, bool):
        raise _wrong("body.logprobs", "must be true or false")
    config: dict[str, Any] = {"response_logprobs": True} if wanted else {}
    if "top_logprobs" in body:
        if not wanted:
            raise _lacks("body.top_logprobs", "top_logprobs without logprobs")
        config["logprobs"] = _integer(body["top_logprobs"], "body.top_logprobs")
    return config


def _format(body: dict[str, Any]) -> dict[str, Any]:
    if "response_format" not in body:
        return {}
    path = "body.response_format"
    asked = _members(body["response_format"], path, frozenset({"type", "json_schema"}))
    kind = asked.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise _lacks(f"{path}.type", f"response format {kind!r}")
    if kind != "json_schema":
        if "json_schema" in asked:
            raise _lacks(f"{path}.json_schema", f"schema for the response format {kind!r}")
        return {"response_mime_type": "application/json"} if kind == "json_object" else {}
    path += ".json_schema"
    schema = _members(asked.get("json_schema"), path, frozenset({"name", "strict", "schema"})).get("schema")
    if not isinstance(schema, dict):
        raise _wrong(f"{path}.schema", "must be an object")
    return {"response_mime_type": "application/json", "response_json_schema": schema}


def _thinking(body: dict[str, Any], model: str) -> dict[str, Any]:
    """How much the model thinks: Gemini 2.5 counts tokens, Gemini 3 has levels and still takes a number of tokens."""
    names = [name for name in ("reasoning_effort", "thinking_budget") if name in body]
    if not names:
        return {}
    path = f"body.{names[0]}"
    if len(names) > 1:
        raise _wrong("body.thinking_budget", "contradicts body.reasoning_effort: give one of them")
    family = next(((key, efforts) for pattern, key, efforts in _FAMILIES if pattern.search(model)), None)
    if family is None:
        raise _lacks(path, f"{names[0]} for the model {model!r}, only for gemini-2.5 and gemini-3")
    key, efforts = family
    value = body[names[0]]
    if names[0] == "thinking_budget":
        return {"thinking_config": {"thinking_budget": _integer(value, path)}}
    if not isinstance(value, str) or value not in efforts:
        raise _lacks(path, f"effort {value!r} for the model {model!r}")
    return {"thinking_config": {key: efforts[value]}}


def _safety(value: Any) -> list[Any]:
    """Gemini's own list (ai.google.dev/api/generate-content#SafetySetting), which --extra-body may give."""
    settings = []
    for index, entry in enumerate(_list(value, "body.safety_settings")):
        path = f"body.safety_settings[{index}]"
        setting = _members(entry, path, frozenset({"category", "threshold"}))
        for name in ("category", "threshold"):
            _string(setting.get(name), f"{path}.{name}")
        settings.append(setting)
    return settings


def _members(value: Any, path: str, known: frozenset[str]) -> dict[str, Any]:
    """The members of an object that are not null. Raises `RowError` that names the first one that is not known."""
    if not isinstance(value, dict):
        raise _wrong(path or "the line", "must be an object")
    members = {name: member for name, member in value.items() if member is not None}
    for name in members:
        if name not in known:
            raise _lacks(f"{path}.{name}" if path else name, "such field")
    return members


def _list(value: Any, path: str) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong(path, "must be a list")
    return value


def _string(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise _wrong(path, "must be a string")
    return value


def _integer(value: Any, path: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(path, "must be a whole number")
    if not -(2**31) <= value < 2**31:
        raise _lacks(path, "whole number of more than 32 bits")
    return value


def _lacks(path: str, what: str) -> RowError:
    return _wrong(path, f"Gemini's batch API has no {what}")


def _wrong(path: str, why: str) -> RowError:
    return RowError("unmapped", f"{path}: {why}")
