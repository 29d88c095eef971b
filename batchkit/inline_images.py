"""Images inside the cells of a table: base64, data URLs, lists of these or of paths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from batchkit.tasks import Images

SHORTEST = 64
"""A cell of up to so many characters holds no image: VLMEvalKit's rule (vlmeval/dataset/image_base.py, 0.2)."""

BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0AK")
"""JPEG, PNG, GIF, WebP (RIFF), BMP, TIFF (both byte orders): their first bytes as base64."""

_QUOTED = r"""(?:'[^'\\]*'|"[^"\\]*")"""
_LIST = re.compile(rf"\[\s*{_QUOTED}(?:\s*,\s*{_QUOTED})*\s*,?\s*\]")
"""A list of texts as Python writes it: where no text has quotes or backslashes, which no base64 and few paths have."""


def is_inline(text: str) -> bool:
    """Whether a text is an image itself, not where one is."""
    return text.startswith("data:") or (len(text) > SHORTEST and text.startswith(BASE64_STARTS))


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


def cell_images(text: str) -> tuple[Images | None, bool]:
    """The images of a cell that is more than one path (else None), and whether it holds image data."""
    if is_inline(text):
        return (as_source(text),), True
    listed = split_list(text)
    if listed is None:
        return None, False
    inline = any(map(is_inline, listed))
    return tuple(as_source(one) if is_inline(one) else one for one in listed), inline


def detach(fields: dict[str, Any], names: tuple[str, ...]) -> Mapping[str, Images] | None:
    """Take the images out of the image fields `names` whose values are texts; return what was taken, by field.

    Image data leave the row. Paths stay in it; those of a list that is written as a text are taken, too.
    """
    attached: dict[str, Images] = {}
    for name in names:
        value = fields.get(name)
        if not isinstance(value, str) or not value:
            continue
        images, inline = cell_images(value)
        if images is not None:
            attached[name] = images
        if inline:
            del fields[name]
    return attached or None
