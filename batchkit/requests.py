"""Task + options → one request line in OpenAI batch format. No network, no clock, no files.

Lines are spliced from bytes that are JSON already: what all requests of a run share is encoded once, and base64 text
needs no escaping.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import msgspec
import pybase64

from batchkit.errors import UsageError
from batchkit.images import Picture
from batchkit.limits import CHAT

RESERVED = frozenset({"model", "messages", "stream"})
"""Keys of the body that `--extra-body` may not set: batchkit writes them, or a batch cannot have them."""

_encode = msgspec.json.Encoder().encode


class _Asked(msgspec.Struct, gc=False):
    url: str
    body: msgspec.Raw


_decode_asked = msgspec.json.Decoder(_Asked).decode


def fingerprint(line: bytes) -> bytes:
    """Equal for requests that ask the same, whatever their custom_id: the same url, and the same body byte for byte."""
    asked = _decode_asked(line)
    url = asked.url.encode("utf-8", "surrogatepass")
    digest = blake2b(b"%d %b" % (len(url), url), digest_size=16)
    digest.update(asked.body)
    return digest.digest()


class RequestMaker:
    """Makes the request lines of a run.

    `parameters` are the keys of the body beside model and messages (max_tokens, temperature, …); `extra` overrides
    them. Raises `UsageError` where `extra` holds a key that is not the user's.
    """

    def __init__(
        self,
        *,
        model: str,
        system: str | None,
        parameters: dict[str, Any],
        extra: dict[str, Any],
        detail: str | None,
    ) -> None:
        if taken := RESERVED & extra.keys():
            raise UsageError(f"--extra-body may not set {min(taken)!r}", hint="leave it out: batchkit sets it")
        body = {name: value for name, value in parameters.items() if value is not None} | extra
        messages = b"["
        if system is not None:
            messages += _encode({"role": "system", "content": system}) + b","
        self._before_messages = (
            b'","method":"POST","url":' + _encode(CHAT) + b',"body":{"model":' + _encode(model) + b',"messages":'
        ) + messages
        members = _encode(body)[1:-1]
        self._after_messages = b"]" + (b"," + members if members else b"") + b"}}"
        self._detail = b',"detail":' + _encode(detail) if detail is not None else b""

    def line(self, custom_id: str, content: Sequence[str | Picture]) -> bytes:
        """One request, without a line feed. `content` are texts and pictures in the order in which the model sees them.

        `custom_id` needs no escaping: it is of [A-Za-z0-9_-].
        """
        parts = [b'{"custom_id":"', custom_id.encode("ascii"), self._before_messages, b'{"role":"user","content":']
        if len(content) == 1 and isinstance(content[0], str):
            parts.append(_encode(content[0]))
        else:
            opening = b"["
            for part in content:
                parts.append(opening)
                parts += self._text(part) if isinstance(part, str) else self._picture(part)
                opening = b","
            parts.append(b"]")
        parts += (b"}", self._after_messages)
        return b"".join(parts)

    def _text(self, text: str) -> tuple[bytes, ...]:
        return b'{"type":"text","text":', _encode(text), b"}"

    def _picture(self, picture: Picture) -> tuple[bytes, ...]:
        return (
            b'{"type":"image_url","image_url":{"url":"data:',
            picture.media_type.encode("ascii"),
            b";base64,",
            pybase64.b64encode(picture.data),
            b'"',
            self._detail,
            b"}}",
        )
