"""How many tokens a request takes, as far as that can be told without its model: estimates, made fast."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import pybase64

from batchkit.grids import image_tokens


def text_tokens(text_bytes: int) -> int:
    """About how many tokens text of so many UTF-8 bytes takes: a quarter, rounded up.

    Four characters a token is the rule of thumb that both OpenAI (help.openai.com/en/articles/4936856) and Google
    (ai.google.dev/gemini-api/docs/tokens) give for English. Bytes instead of characters, because letters that take two
    to four bytes take about as many more tokens. No tokenizer: each model has its own, and most would be a download.
    """
    return -(-text_bytes // 4)


class RequestTokens(NamedTuple):
    """`text` is an estimate. `image` is None where the tokens of an image, or of audio or a file, are not known."""

    text: int
    image: int | None
    images: int
    max_output: int | None


class _Line(msgspec.Struct):
    body: dict[str, Any]
    url: str = ""


_decode = msgspec.json.Decoder(_Line).decode
_encode = msgspec.json.Encoder().encode

_SAID = ("messages", "input", "prompt", "instructions", "text_1", "text_2", "queries", "query", "documents")
_SCHEMAS = ("tools", "functions", "response_format", "text")
_OUTPUT_LIMITS = ("max_completion_tokens", "max_output_tokens", "max_tokens")
_NOT_SAID = frozenset({"type", "role"})
_OTHER_MEDIA = frozenset({"input_audio", "audio_url", "video_url", "input_video", "file", "input_file", "image_embeds"})
_WITHOUT_OUTPUT = ("/embeddings", "/moderations", "/score", "/rerank")


def request_tokens(line: bytes, model: str) -> RequestTokens:
    """Tokens of one request line in OpenAI batch format, whoever made it.

    Of images in data URLs only the header is decoded; images behind links are not looked at, and their tokens not
    known. Raises `msgspec.DecodeError` where the line is no request.
    """
    request = _decode(line)
    body = request.body
    counted = sum(len(_encode(body[key])) for key in _SCHEMAS if key in body)
    image: int | None = 0
    images = 0
    pending = [body[key] for key in _SAID if key in body]
    while pending:  # not recursive: a foreign line may be nested deeply
        value = pending.pop()
        if isinstance(value, str):
            counted += len(value.encode("utf-8", "surrogatepass"))
        elif isinstance(value, list):
            pending += value
        elif isinstance(value, dict):
            kind = value.get("type")
            if kind in ("image_url", "input_image") or "image_url" in value:
                images += 1
                image = _sum(image, _part_tokens(value, model))
            elif isinstance(kind, str) and kind in _OTHER_MEDIA:
                image = None
            else:
                pending += [member for key, member in value.items() if key not in _NOT_SAID]
    output = 0 if request.url.endswith(_WITHOUT_OUTPUT) else _most_output(body)
    return RequestTokens(text_tokens(counted), image, images, output)


def _most_output(body: dict[str, Any]) -> int | None:
    limits = [value for key in _OUTPUT_LIMITS if isinstance(value := body.get(key), int) and value > 0]
    answers = body.get("n")
    return min(limits) * max(1, answers if isinstance(answers, int) else 1) if limits else None


def _part_tokens(part: dict[str, Any], model: str) -> int | None:
    """Of a part `image_url` (chat) or `input_image` (responses)."""
    image = part.get("image_url")
    url, detail = (image.get("url"), image.get("detail")) if isinstance(image, dict) else (image, part.get("detail"))
    size = _size(url) if isinstance(url, str) else None
    if size is None:
        return None
    return image_tokens(model, *size, detail if isinstance(detail, str) else None)


def _size(url: str) -> tuple[int, int] | None:
    """Width and height out of a data URL, or None; decodes no more of it than the header of the image takes."""
    comma = url.find(",", 0, 256)
    if comma < 0 or not url.startswith("data:") or not url.endswith(";base64", 0, comma):
        return None
    whole = len(url) - comma - 1
    for taken in (1 << 12, 1 << 16, 1 << 20, whole):  # whole groups of four characters
        if size := _header_size(url[comma + 1 : comma + 1 + taken]):
            return size
        if taken >= whole:
            break
    return None


def _header_size(text: str) -> tuple[int, int] | None:
    from PIL import Image

    try:
        # Named, so that a header which is cut off does not make Pillow load all of its formats.
        formats = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
        with Image.open(io.BytesIO(pybase64.b64decode(text)), formats=formats) as image:
            return image.size if min(image.size) > 0 else None
    except Exception:  # noqa: BLE001  # hostile files make decoders raise anything, and half a header as well
        return None


def _sum(one: int | None, other: int | None) -> int | None:
    return one + other if one is not None and other is not None else None


@dataclass
class Totals:
    """What requests take together; `image` and `output` are None once they are not known of one of them."""

    requests: int = 0
    text: int = 0
    image: int | None = 0
    images: int = 0
    output: int | None = 0

    @property
    def input(self) -> int | None:
        return _sum(self.text, self.image)

    def merge(self, other: Totals) -> None:
        self.requests += other.requests
        self.text += other.text
        self.image = _sum(self.image, other.image)
        self.images += other.images
        self.output = _sum(self.output, other.output)

    def add(self, tokens: RequestTokens) -> None:
        self.requests += 1
        self.text += tokens.text
        self.image = _sum(self.image, tokens.image)
        self.images += tokens.images
        self.output = _sum(self.output, tokens.max_output)
