"""Signatures of presigned URLs, in what others quote of their input: whoever has one may read the object."""

from __future__ import annotations

import re

_SIGNED = re.compile(r"(X-Amz-(?:Signature|Credential|Security-Token)(?:=|%3D))[^&\s\"'<>\\)]+", re.IGNORECASE)
_SIGNED_BYTES = re.compile(_SIGNED.pattern.encode(), re.IGNORECASE)


def hide(text: str) -> str:
    """The text without them."""
    return _SIGNED.sub(r"\1…", text)


def hide_bytes(line: bytes) -> bytes:
    """The same of a line of JSON."""
    return _SIGNED_BYTES.sub("\\1…".encode(), line)
