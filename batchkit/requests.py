"""Task + options → one request line in OpenAI batch format. No network, no clock, no files.

Lines are spliced from bytes that are JSON already: what all requests of a run share is encoded once, and base64 text
needs no escaping. Each endpoint has a shape: what stands in the body between the model and the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import msgspec
import pybase64

from batchkit.endpoints import Endpoint, endpoint_at
from batchkit.errors import UsageError
from batchkit.images import Picture
from batchkit.limits import CHAT
from batchkit.links import Link

Content = Sequence[str | Picture | Link]
"""Texts, and pictures or links to some, in the order in which the model sees them."""
Documents = str | list[str] | None
"""What a question is compared with: one text, or several."""
Body = Callable[[Content, Documents], list[bytes]]

RESERVED = frozenset({"model", "stream"})
"""Keys of every body that `--extra-body` may not set: batchkit writes them, or a batch cannot have them."""

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
    """Makes the request lines of a run, all to the endpoint `url`.

    `parameters` are the keys of the body that options set (max_tokens, temperature, …); `extra` overrides them.
    Raises `UsageError` where `extra` holds a key that is not the user's.
    """

    def __init__(
        self,
        *,
        model: str,
        system: str | None,
        parameters: dict[str, Any],
        extra: dict[str, Any],
        detail: str | None,
        url: str = CHAT,
    ) -> None:
        endpoint = endpoint_at(url)
        if endpoint is None:
            raise UsageError(f"--url {url}: not known", hint="batchkit prepare --help")
        if taken := (RESERVED | endpoint.members) & extra.keys():
            raise UsageError(f"--extra-body may not set {min(taken)!r}", hint="leave it out: batchkit sets it")
        body = {name: value for name, value in parameters.items() if value is not None} | extra
        self._before = (
            b'","method":"POST","url":' + _encode(url) + b',"body":{"model":' + _encode(model) + b","
        )  # the model comes first in the body: by that, lines of ours are split without being parsed
        self._shape = _shape_of(endpoint, system, detail)
        members = _encode(body)[1:-1]
        self._after = (b"," + members if members else b"") + b"}}\n"

    def line(self, custom_id: str, content: Content, documents: Documents = None) -> bytes:
        """One request, with its line feed. `documents` are for score and rerank.

        `custom_id` needs no escaping: it is of [A-Za-z0-9_-].
        """
        shape = self._shape(content, documents)
        return b"".join([b'{"custom_id":"', custom_id.encode("ascii"), self._before, *shape, self._after])


def _shape_of(endpoint: Endpoint, system: str | None, detail: str | None) -> Body:
    match endpoint.shape:
        case "chat":
            return _chat(system, detail)
        case "responses":
            return _responses(system, detail)
        case "completions":
            return _text_in(b'"prompt":')
        case "embeddings":
            return _embeddings(system, detail)
        case "score":
            return _score
        case "rerank":
            return _rerank


# -- endpoints that see images ---------------------------------------------------------------------------------------


def _chat(system: str | None, detail: str | None) -> Body:
    """`messages`; a question that is text alone is no list of parts."""
    before = b'"messages":['
    if system is not None:
        before += _encode({"role": "system", "content": system}) + b","
    before += b'{"role":"user","content":'
    image = b'{"type":"image_url","image_url":{"url":'
    behind = _detail(detail) + b"}}"

    def shape(content: Content, _: Documents) -> list[bytes]:
        if len(content) == 1 and isinstance(content[0], str):
            return [before, _encode(content[0]), b"}]"]
        return [before, *_parts(content, b'{"type":"text","text":', image, behind), b"}]"]

    return shape


def _responses(system: str | None, detail: str | None) -> Body:
    """`instructions` and `input`; a question that is text alone is the input itself."""
    before = b'"instructions":' + _encode(system) + b',"input":' if system is not None else b'"input":'
    image = b'{"type":"input_image","image_url":'
    behind = _detail(detail) + b"}"

    def shape(content: Content, _: Documents) -> list[bytes]:
        if len(content) == 1 and isinstance(content[0], str):
            return [before, _encode(content[0])]
        parts = _parts(content, b'{"type":"input_text","text":', image, behind)
        return [before, b'[{"role":"user","content":', *parts, b"}]"]

    return shape


def _embeddings(system: str | None, detail: str | None) -> Body:
    """`input`; vLLM's `messages` where there is more than a text."""
    of_text, of_messages = _text_in(b'"input":'), _chat(system, detail)

    def shape(content: Content, documents: Documents) -> list[bytes]:
        plain = system is None and all(isinstance(part, str) for part in content)
        return (of_text if plain else of_messages)(content, documents)

    return shape


def _detail(detail: str | None) -> bytes:
    return b',"detail":' + _encode(detail) if detail is not None else b""


def data_url(picture: Picture) -> tuple[bytes, ...]:
    """A picture as a text in JSON, quotes too, in pieces."""
    return (b'"data:', picture.media_type.encode("ascii"), b";base64,", pybase64.b64encode(picture.data), b'"')


def _parts(content: Content, text: bytes, image: bytes, behind: bytes) -> list[bytes]:
    """A list of parts: `text` goes before a text, `image` before the address of a picture, `behind` behind it."""
    parts = []
    opening = b"["
    for part in content:
        parts.append(opening)
        if isinstance(part, str):
            parts += (text, _encode(part), b"}")
        elif isinstance(part, Link):
            parts += (image, _encode(part.uri), behind)
        else:
            parts += (image, *data_url(part), behind)
        opening = b","
    parts.append(b"]")
    return parts


# -- endpoints of text alone -----------------------------------------------------------------------------------------


def _text(content: Content) -> bytes:
    return _encode("".join(part for part in content if isinstance(part, str)))


def _text_in(key: bytes) -> Body:
    def shape(content: Content, _: Documents) -> list[bytes]:
        return [key, _text(content)]

    return shape


def _score(content: Content, documents: Documents) -> list[bytes]:
    return [b'"text_1":', _text(content), b',"text_2":', _encode(documents)]


def _rerank(content: Content, documents: Documents) -> list[bytes]:
    listed = [documents] if isinstance(documents, str) else documents
    return [b'"query":', _text(content), b',"documents":', _encode(listed)]
