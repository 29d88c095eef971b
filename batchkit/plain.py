"""Plain answers: response lines of the commonest shape, read several times faster than by `responses.parse`.

Plain is what OpenAI, vLLM and most others write for a chat that went well: status 200, one choice with a text that is
not empty, finished by itself or at its limit, without a refusal and without images. The types below say nearly all of
it, so that msgspec itself refuses what is not plain; `responses.parse` judges that, and would judge these the same.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from batchkit.responses import Response, Verdict


class _Message(msgspec.Struct, gc=False, omit_defaults=True):
    content: Annotated[str, msgspec.Meta(min_length=1)]
    refusal: Literal[""] | None = None
    images: Annotated[list[Any], msgspec.Meta(max_length=0)] | None = None


class _Choice(msgspec.Struct, gc=False):
    message: _Message
    finish_reason: Literal["stop", "length"]


class _Body(msgspec.Struct, gc=False, omit_defaults=True):
    choices: tuple[_Choice]
    model: str | None = None
    usage: msgspec.Raw = msgspec.Raw(b"null")


class _Returned(msgspec.Struct, gc=False):
    status_code: Literal[200]
    body: _Body


class PlainLine(msgspec.Struct, gc=False):
    custom_id: str
    response: _Returned


NOT_PLAIN = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What `read_line` and `read_usage` raise."""

VERDICTS = {"stop": Verdict.ANSWERED, "length": Verdict.TRUNCATED}
"""By finish reason."""

IMAGE_IN_TEXT = "data:image/"
"""A content with this in it may hold an image: whether it is plain, `responses` knows."""

encode_lines = msgspec.json.Encoder().encode_lines
"""Plain lines again, without what nobody reads: a third as long."""
read_line = msgspec.json.Decoder(PlainLine).decode
_decode_usage = msgspec.json.Decoder(dict[str, Any] | None).decode
_encode = msgspec.json.Encoder().encode


def compact_usage(raw: bytes) -> bytes:
    """The usage as a result has it: JSON without white space."""
    return _encode(_decode_usage(raw))


def read_usage(raw: bytes) -> dict[str, Any] | None:
    usage: dict[str, Any] | None = _decode_usage(raw)
    return usage


def to_response(custom_id: str, content: str, usage: bytes, model: str | None, finish: str) -> Response:
    """A plain answer as `responses.parse` gives it."""
    return Response(custom_id, VERDICTS[finish], content, finish, read_usage(usage), model)
