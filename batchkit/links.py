"""Links: images that stay where they are, and that a request names by their address.

`file://` with an absolute path, `s3://` with the key as it is, and `http(s)://` as the row has it. `submit` puts in
their place what the backend can open: `resolving` does that.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote_to_bytes, urlsplit

import msgspec

from batchkit import images, references, s3
from batchkit.errors import RowError, UsageError

_LINK = re.compile(rb'("image_url":(?:\{"url":)?)("(?:file|s3|https?)://(?:[^"\\]|\\.)*")')
"""In lines that batchkit made. A text that quotes these words has backslashes in them."""

_decode = msgspec.json.Decoder(str).decode

REMOTE_BYTES = 250_000
"""What a remote image is believed to have: nobody has looked at it yet."""
PIXELS_PER_BYTE = 4
"""Of photographs as JPEG, about: what decoding an image that nobody has looked at may take."""


class Link(NamedTuple):
    """`size` in bytes and `folder` (with its symbolic links followed) are of a file, None for what is remote."""

    uri: str
    size: int | None = None
    folder: str | None = None

    @property
    def pixels(self) -> int:
        """A guess."""
        return PIXELS_PER_BYTE * (REMOTE_BYTES if self.size is None else self.size)


class Links(msgspec.Struct, frozen=True, kw_only=True):
    """The links of a shard: how many there are of each kind. `folder` holds all of the files, wherever it is; None
    where there are none."""

    files: int = 0
    objects: int = 0
    web: int = 0
    folder: str | None = None

    @property
    def inlined(self) -> int:
        """About how many bytes the objects have as base64."""
        return self.objects * REMOTE_BYTES * 4 // 3

    def with_one(self, link: Link) -> Links:
        files = link.folder is not None
        objects = s3.is_s3(link.uri)
        return Links(
            files=self.files + files,
            objects=self.objects + objects,
            web=self.web + (not files and not objects),
            folder=common_folder(self.folder, link.folder),
        )

    def together(self, other: Links) -> Links:
        return Links(
            files=self.files + other.files,
            objects=self.objects + other.objects,
            web=self.web + other.web,
            folder=common_folder(self.folder, other.folder),
        )


def common_folder(one: str | None, other: str | None) -> str | None:
    """The innermost folder that holds both."""
    if one is None or other is None or one == other:
        return one or other
    return os.path.commonpath((one, other))


def link_to(reference: str, root: str) -> Link:
    """The link to an image: a path (relative to `root`), a `file://` URI, or an address.

    Looks whether a file is there, and reads nothing of it. Raises `RowError` with code `image`.
    """
    uri = references.remote(reference, root)
    if uri is not None:
        return Link(_checked(uri))
    name, found = images.find(reference, root)
    if not found.st_size:
        raise RowError("image", f"image is empty: {references.shown(reference)}")
    path = Path(name).absolute()
    return Link(path.as_uri(), found.st_size, os.path.dirname(os.path.realpath(path)))  # noqa: PTH120  # a text, as it is kept


def _checked(uri: str) -> str:
    scheme, _, rest = uri.partition("://")
    uri = f"{scheme.lower()}://{rest}"
    try:
        named = all(s3.split(uri)) if s3.is_s3(uri) else bool(urlsplit(uri).hostname)
    except (ValueError, UsageError):
        named = False
    if not named:
        raise RowError("image", f"not the address of an image: {references.shown(uri)}")
    return uri


def refuse_private(uri: str) -> None:
    """Raise `RowError` where a web image is at an address that is written as a number, and not public. Names are looked
    up when it is sent."""
    from batchkit.addresses import PrivateAddressError, check_literal

    try:
        check_literal(urlsplit(uri).hostname or "")
    except PrivateAddressError as exc:
        why = f"image is not fetched: {references.shown(uri)}: {exc}; prepare --allow-private-hosts allows it"
        raise RowError("image", why) from exc


def path_of(uri: str) -> Path:
    """The file of a `file://` URI."""
    return Path(os.fsdecode(unquote_to_bytes(urlsplit(uri).path)))


def split(line: bytes) -> list[bytes | str]:
    """A request line of ours in pieces: bytes, and links, each in place of its JSON text, quotes too."""
    pieces: list[bytes | str] = []
    at = 0
    for found in _LINK.finditer(line):
        pieces += (line[at : found.start(2)], _decode(found[2]))
        at = found.end()
    pieces.append(line[at:])
    return pieces
