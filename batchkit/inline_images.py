"""Images inside the values of a row: base64, data URLs, lists of these or of paths. One rule for all formats."""

from __future__ import annotations

import re
from typing import Any

import msgspec

Images = tuple[str | bytes, ...]
"""The images of one field: encoded bytes, or a path or URL (a `data:` URL, too)."""

SHORTEST = 64
"""A text of up to so many characters holds no image: VLMEvalKit's rule (vlmeval/dataset/image_base.py, 0.2)."""

BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk0", "Qk1", "Qk2", "Qk3", "SUkq", "TU0AK")
"""JPEG, PNG, GIF, WebP (RIFF), BMP, TIFF (both byte orders): their first bytes as base64."""

_BASE64 = re.compile(r"[A-Za-z0-9+/\r\n]{64}")

_QUOTED = r"""(?:'[^'\\]*'|"[^"\\]*")"""
_LIST = re.compile(rf"\[\s*{_QUOTED}(?:\s*,\s*{_QUOTED})*\s*,?\s*\]")
"""A list of texts as Python writes it: where no text has quotes or backslashes, which no base64 and few paths have."""


def is_inline(text: str) -> bool:
    """Whether a text is an image itself, not where one is."""
    return text.startswith("data:") or _is_base64(text)


def _is_base64(text: str) -> bool:
    return len(text) > SHORTEST and text.startswith(BASE64_STARTS) and _BASE64.match(text) is not None


def _is_surely_inline(text: str) -> bool:
    """Whether a text of a field that may be anything is an image."""
    return text.startswith("data:image/") or _is_base64(text)


def as_source(text: str) -> str:
    """A text that is an image, as a data URL; it is decoded where the image is needed."""
    if text.startswith("data:"):
        return text
    if any(map(text.__contains__, " \r\n\t")):
        text = "".join(text.split())
    return "data:;base64," + text


def split_list(text: str) -> list[str] | None:
    """The texts of a cell that holds a list, as JSON or as Python writes it; None for any other cell."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        return msgspec.json.decode(text, type=list[str])
    except (msgspec.DecodeError, RecursionError):
        if _LIST.fullmatch(text) is None:
            return None
        return [quoted[1:-1] for quoted in re.findall(_QUOTED, text)]


def images_in(value: str) -> Images:
    """The images of a text: one path, one image, or a list of these."""
    listed = split_list(value)
    return tuple(as_source(one) if is_inline(one) else one for one in ([value] if listed is None else listed))


def detach(fields: dict[str, Any], names: tuple[str, ...]) -> dict[str, Images]:
    """Take image data out of a row whose fields are texts, lists and the like; return the images, by field.

    `names` are the image fields. Of those that hold a list written as a text, the images are returned in any case.
    Paths stay in the row, beside image data as a list with gaps.
    """
    attached: dict[str, Images] = {}
    for name, value in list(fields.items()):
        named = name in names
        listed = split_list(value) if isinstance(value, str) else value
        texts = [value] if listed is None else listed
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            continue
        inline = list(map(is_inline if named else _is_surely_inline, texts))
        if any(inline) or (named and listed is not value and listed is not None):
            attached[name] = tuple(as_source(text) if is_inline(text) else text for text in texts)
        if any(inline):
            del fields[name]
            if not all(inline):
                fields[name] = [None if gone else text for text, gone in zip(texts, inline, strict=True)]
    return attached
