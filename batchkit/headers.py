"""The headers of plain JPEGs and PNGs, read without Pillow: most images pass through unchanged, and for those the
header is all there is to check. Whatever is not quite plain is left to Pillow, which is the judge of it."""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

PNG_START = b"\x89PNG\r\n\x1a\n"


class Header(NamedTuple):
    """`kind` is Pillow's name of the format; `width` and `height` in pixels, as they are stored."""

    kind: str
    width: int
    height: int


def read(data: bytes) -> Header | None:
    """The header of an image that Pillow would certainly open; None says nothing about it."""
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data.startswith(PNG_START):
        return _png(data)
    return None


_FRAME = struct.Struct(">BHHB")
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
"""Start of frame: baseline, extended sequential and progressive, with Huffman coding."""
_QUANTIZATION, _SCAN = 0xDB, 0xDA
_SKIPPED = frozenset({*range(0xE0, 0xF0), 0xFE, 0xC4, 0xDD})
"""Application data, comments, Huffman tables, restart intervals."""
_NAMED = {0xE0: (b"JFIF", 9), 0xE2: (b"ICC_PROFILE\0", 16), 0xEE: (b"Adobe", 9)}
"""Application data that Pillow reads, by its name, and the length without which it opens nothing."""
_ENOUGH = 16
"""For any of them."""


def _jpeg(data: bytes) -> Header | None:
    """ITU-T T.81 annex B: segments up to the first scan, each a marker and its length."""
    at, end = 2, len(data)
    found: Header | None = None
    while at + 4 <= end and data[at] == 0xFF:
        marker = data[at + 1]
        length = data[at + 2] << 8 | data[at + 3]
        if length < 2 or at + 2 + length > end:
            return None
        if marker == _SCAN:
            return found
        if marker in _FRAMES and found is None:
            found = _frame(data, at + 4, length)
            if found is None:
                return None
        elif marker == _QUANTIZATION:
            if (length - 2) % 65 or max(data[at + 4 : at + 2 + length : 65], default=0) > 15:
                return None  # other tables than those of 8 bits
        elif marker not in _SKIPPED or (length < _ENOUGH and _is_short(data, at + 4, marker, length)):
            return None
        at += 2 + length
    return None


def _is_short(data: bytes, at: int, marker: int, length: int) -> bool:
    name, least = _NAMED.get(marker, (b"", 0))
    return length < least and data.startswith(name, at)


def _frame(data: bytes, at: int, length: int) -> Header | None:
    if length < 8:
        return None
    precision, height, width, parts = _FRAME.unpack_from(data, at)
    if precision != 8 or parts not in (1, 3) or length != 8 + 3 * parts or not width or not height:
        return None
    return Header("JPEG", width, height)


_CHUNK = struct.Struct(">I4s")
_IHDR = struct.Struct(">IIBBBBB")
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Bits by colour type."""
_HARMLESS = {
    b"PLTE": 0, b"tRNS": 0, b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9, b"sBIT": 0, b"bKGD": 0, b"tIME": 0,
    b"eXIf": 0,
}  # fmt: skip
"""With the bytes that Pillow wants there at least."""
_TRANSPARENT = {0: 2, 2: 6}
"""The same for tRNS, by colour type."""


def _png(data: bytes) -> Header | None:
    """PNG, W3C, sections 5 and 11: chunks up to the first of the image, each with its checksum."""
    at, end = len(PNG_START), len(data)
    found: Header | None = None
    least: dict[bytes, int] = _HARMLESS
    while at + 12 <= end:
        length, kind = _CHUNK.unpack_from(data, at)
        if kind == b"IDAT":
            return found
        if at + 12 + length > end or (kind != b"IHDR" if found is None else length < least.get(kind, end)):
            return None
        checksum = int.from_bytes(data[at + 8 + length : at + 12 + length], "big")
        if zlib.crc32(data[at + 4 : at + 8 + length]) != checksum:
            return None
        if found is None:
            if length != _IHDR.size:
                return None
            width, height, depth, colour, *methods, interlaced = _IHDR.unpack_from(data, at + 8)
            if not width or not height or depth not in _DEPTHS.get(colour, ()) or any(methods) or interlaced > 1:
                return None
            found = Header("PNG", width, height)
            least = _HARMLESS | {b"tRNS": _TRANSPARENT.get(colour, 0)}
        at += 12 + length
    return None
