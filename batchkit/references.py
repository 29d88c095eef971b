"""Where an image is: here, or behind an address. Fetches nothing."""

from __future__ import annotations

import re
from urllib.parse import quote, urljoin, urlsplit

REMOTE = ("s3://", "http://", "https://")
_MARK = re.compile(rb"://|\\/|\\u003[aA]|\\u002[fF]")
"""An address in JSON, and the ways to escape what is special in it: a row with none of these has no remote image."""

_BASE64 = re.compile(r"[A-Za-z0-9+/=\s]+")


def is_address(reference: str) -> bool:
    """Whether an image can be fetched from there. Any other scheme (`data:`, `file:`) is none."""
    return reference[:8].lower().startswith(REMOTE)


def remote(reference: str | bytes, root: str) -> str | None:
    """The address of an image, where it is remote: as the row has it, or a relative path below a remote `root`, which
    has no slash at its end."""
    if isinstance(reference, bytes):
        return None
    if "://" in reference:
        return reference if is_address(reference) else None
    if not is_address(root) or reference.startswith(("/", "data:")):
        return None
    if root.startswith("s3://"):
        return _below(root, reference)
    return urljoin(root.rstrip("/") + "/", quote(reference))


def _below(root: str, path: str) -> str:
    """The object that a path names. In a key every slash counts, also the second of two; `.` and `..` mean what they
    do in paths, and lead out of no bucket."""
    bucket, *above = root.removeprefix("s3://").split("/")
    key: list[str] = []
    for part in (*above, *path.split("/")):
        if part == "..":
            del key[-1:]
        elif part != ".":
            key.append(part)
    return f"s3://{bucket}/{'/'.join(key)}"


def may_be_remote(raw: bytes) -> bool:
    """Whether a row, as JSON, may name a remote image. Cheap; False is certain."""
    return _MARK.search(raw) is not None


def shown(reference: str) -> str:
    """A reference as it may appear in messages: no base64, no endless names, no signatures, no passwords."""
    if reference.startswith("data:"):
        return reference.partition(",")[0][:60] + ",…"
    if "://" in reference and not reference.startswith("s3://"):  # in a key, a question mark is a letter
        reference = reference.partition("?")[0]
    if is_address(reference) and "@" in _host(reference):
        reference = reference.replace(_host(reference), _host(reference).rpartition("@")[2], 1)
    if len(reference) > 64 and _BASE64.fullmatch(reference):
        return f"(base64, {len(reference):,} characters, of no image format that is known by its beginning)"
    return reference if len(reference) <= 200 else reference[:200] + "…"


def _host(url: str) -> str:
    try:
        return urlsplit(url).netloc
    except ValueError:
        return ""
