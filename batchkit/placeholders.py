"""Where a text wants its images: placeholders in the text → texts and places. Knows nothing of rows.

Two forms, as datasets have them: `<image_start>[problem_image_1]<image_end>` names the field of the image, `<image>` is
the next image that no other placeholder names.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from batchkit.errors import RowError

_PLACEHOLDER = re.compile(
    # The length is bounded so that a text full of beginnings is still read in linear time.
    r"<image>|<image_start>(?:\s{0,9}\[(?P<field>[^<>\n]{1,500})\]\s{0,9}<image_end>)?|<image_end>"
)

_BEGINNING = "<image"
"""Of all of these."""

AS_TEXT = "--no-placeholders takes it as text"


class Place(NamedTuple):
    """A place for images: all of `field`, or its entry number `entry` (from 0). `field` None: the next image."""

    field: str | None = None
    entry: int | None = None

    def __str__(self) -> str:
        if self.field is None:
            return "<image>"
        return f"[{self.field}]" if self.entry is None else f"[{self.field}] (entry {self.entry})"


def split(text: str) -> list[str | Place]:
    """The text in pieces, a `Place` for each placeholder; without empty texts.

    Raises `RowError` for half a placeholder: sent as text it would hide that an image is not where it was meant.
    """
    if _BEGINNING not in text:
        return [text] if text else []
    parts: list[str | Place] = []
    end = 0
    for match in _PLACEHOLDER.finditer(text):
        field = match["field"]
        if field is None and match[0] != "<image>":
            raise RowError(
                "placeholder", f"{match[0]} is no whole placeholder: <image_start>[FIELD]<image_end>; {AS_TEXT}"
            )
        parts += (text[end : match.start()], Place(field))
        end = match.end()
    parts.append(text[end:])
    return [part for part in parts if part]
