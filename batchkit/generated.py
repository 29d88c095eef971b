"""Images that a model made: found in the content of a response, and taken out of its text. Serves `bodies`.

Where they are, and who puts them there:

| place | source |
|---|---|
| `message.images[*].image_url.url`, a data URL | OpenRouter, LiteLLM |
| content parts `image_url`, `output_image`, `image` | Gemini's lines as we translate them, OpenAI-compatible servers |
| parts with `inlineData` or `inline_data` | Gemini (ai.google.dev/api/caching#Blob) |
| output items `image_generation_call`, in `result` | OpenAI Responses |
| `data[*].b64_json` | OpenAI images/generations |
| `![…](data:image/…;base64,…)`, or a data URL that is the whole text | servers that put images into Markdown |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import msgspec


class Inline(NamedTuple):
    """An image as a response has it: base64 text, or a `link` to elsewhere."""

    text: str
    media_type: str = ""
    link: bool = False


class Generated(msgspec.Struct, frozen=True, gc=False):
    """An image of a response that was read: `kept` names where its bytes are, None where nobody wanted them; `link` is
    set where it lies elsewhere. Two with one digest are the same."""

    digest: str
    kept: str | None = None
    link: str | None = None


class Said(NamedTuple):
    """What is left of a content: the text without its images (None: there is no text). `segments` counts the texts
    before, between and behind the images; None where the images have no place in the text."""

    text: str | None
    images: tuple[Inline, ...] = ()
    segments: int | None = None


_KINDS = frozenset({"image_url", "input_image", "output_image", "image", "image_generation_call"})
_HOLDERS = ("image_url", "source", "image", "b64_json", "result", "data", "image_base64", "base64", "url")
_TYPES = ("media_type", "mime_type", "mimeType")
_IN_TEXT = "data:image/"
_URL = r"data:image/[\w.+-]{1,40}(?:;[\w.+-]{1,40}=[\w.+-]{1,40}){0,4};base64,[A-Za-z0-9+/_=\s-]++"
_TITLE = r"""(?:(?<=\s)(?:"[^"\n]{0,1000}"|'[^'\n]{0,1000}')\s*)?"""
_MARKDOWN = re.compile(rf"!\[[^\]\n]{{0,1000}}\]\(\s*<?({_URL})>?\s*{_TITLE}\)")
_DATA_URL = re.compile(rf"\s*<?({_URL})>?\s*")


def read(content: Any) -> Said:
    """Read the content of a message: a string, or parts. Where an image stood between two texts, the text has a blank
    line."""
    if isinstance(content, str) and _IN_TEXT not in content:
        return Said(content)
    images: list[Inline] = []
    runs, has_text = [""], False
    for piece in _pieces(content):
        if isinstance(piece, Inline):
            images.append(piece)
            runs.append("")
        else:
            runs[-1] += piece
            has_text = True
    if not images:
        return Said(runs[0] if has_text else None)
    told = [run for run in runs if run.strip()]
    return Said("\n\n".join(told) if has_text else None, tuple(images), len(told))


def listed(entries: Any) -> tuple[Inline, ...]:
    """The images of a list that holds nothing else (`message.images`)."""
    if not isinstance(entries, list):
        return ()
    found = (_held(entry, "") if isinstance(entry, (str, dict)) else None for entry in entries)
    return tuple(image for image in found if image is not None)


def _pieces(content: Any) -> Iterator[str | Inline]:
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            yield from _split(part)
        elif isinstance(part, dict):
            if isinstance(part.get("text"), str) and part["text"]:
                yield from _split(part["text"])
            if (image := of_part(part)) is not None:
                yield image


def of_part(part: dict[str, Any]) -> Inline | None:
    """The image that a content part or an output item is; None where it is something else."""
    blob = part.get("inlineData", part.get("inline_data"))
    if isinstance(blob, dict):
        image = _held(blob, "")
        return image if image is not None and image.media_type.startswith("image/") else None
    return _held(part, "") if part.get("type") in _KINDS else None


def _held(value: Any, media_type: str) -> Inline | None:
    if isinstance(value, str):
        return _of_string(value, media_type)
    if not isinstance(value, dict):
        return None
    named = next((value[name] for name in _TYPES if isinstance(value.get(name), str)), media_type)
    holders = (value[name] for name in _HOLDERS if value.get(name))
    return next((image for holder in holders if (image := _held(holder, named)) is not None), None)


def _of_string(text: str, media_type: str) -> Inline | None:
    if text.startswith("data:"):
        head, _, encoded = text.partition(",")
        return Inline(encoded, head.removeprefix("data:").partition(";")[0]) if head.endswith(";base64") else None
    if "://" in text[:20]:
        return Inline(text, media_type, link=True)
    return Inline(text, media_type) if text else None


def _split(text: str) -> Iterable[str | Inline]:
    """A text with images in it → its pieces. A data URL in code, or anywhere else, is text."""
    if _IN_TEXT not in text:
        return [text]
    if (whole := _DATA_URL.fullmatch(text)) is not None:
        return [image] if (image := _of_string(whole[1], "")) is not None else [text]
    pieces = _MARKDOWN.split(text)  # text, URL, text, URL, …, text
    return [
        image if place % 2 and (image := _of_string(piece, "")) is not None else piece
        for place, piece in enumerate(pieces)
        if piece
    ]
