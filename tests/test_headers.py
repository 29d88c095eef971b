"""The fast way past Pillow must never say other than Pillow would."""

from __future__ import annotations

import io
import itertools
import random
import struct
import zlib

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from batchkit import headers
from tests.test_images import encoded


def as_pillow_sees_it(data: bytes) -> tuple[str, int, int]:
    with Image.open(io.BytesIO(data)) as image:
        return str(image.format).replace("MPO", "JPEG"), *image.size


PLAIN = [
    *(encoded("JPEG", size, mode) for size, mode in itertools.product([(1, 1), (40, 20), (3, 700)], ["RGB", "L"])),
    encoded("JPEG", progressive=True),
    encoded("JPEG", comment=b"a comment", dpi=(72, 72)),
    encoded("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0", icc_profile=b"\0" * 300),
    *(
        encoded("PNG", size, mode)
        for size, mode in itertools.product([(1, 1), (40, 20)], ["RGB", "RGBA", "L", "1", "P"])
    ),
]


@pytest.mark.parametrize("data", PLAIN)
def test_plain_images_are_read_without_pillow(data: bytes) -> None:
    assert headers.read(data) == as_pillow_sees_it(data)


def test_what_is_not_plain_is_left_to_pillow() -> None:
    told = PngInfo()
    told.add_text("a", "b" * 100, zip=True)
    for data in (
        encoded("JPEG", mode="CMYK"),
        encoded("PNG", pnginfo=told),
        encoded("PNG", icc_profile=b"\0" * 300),
        encoded("WEBP"),
        encoded("GIF"),
        b"",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"<html>",
    ):
        assert headers.read(data) is None


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_header_that_is_damaged_is_never_taken_where_pillow_would_not() -> None:
    chance = random.Random(5)
    taken = 0
    for data in PLAIN:
        for _ in range(300):
            damaged = bytearray(data)
            for _ in range(chance.randint(1, 3)):
                damaged[chance.randrange(min(len(data), 700))] = chance.choice(
                    [0, 1, 0x80, 0xFF, chance.randrange(256)]
                )
            some = bytes(damaged[: chance.choice([len(data), chance.randrange(len(data))])])
            found = headers.read(some)
            if found is not None:
                taken += 1
                assert found == as_pillow_sees_it(some)
    assert taken > 500, "else this would show nothing"


def _with_piece(data: bytes, kind: int | bytes, body: bytes) -> bytes:
    """An image with one more segment or chunk, of any content."""
    if isinstance(kind, int):
        return data[:2] + struct.pack(">BBH", 0xFF, kind, len(body) + 2) + body + data[2:]
    checksum = struct.pack(">I", zlib.crc32(kind + body))
    return data[:33] + struct.pack(">I", len(body)) + kind + body + checksum + data[33:]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_segments_and_chunks_that_are_too_short_are_left_to_pillow(kind: str) -> None:
    pieces: list[tuple[int | bytes, bytes]] = [
        (marker, name)
        for marker in (0xE0, 0xE1, 0xE2, 0xED, 0xEE)
        for name in (b"JFIF\0\1\1\0", b"Exif\0\0", b"MPF\0", b"ICC_PROFILE\0", b"Adobe\0\1\1", b"Photoshop 3.0\0008BIM")
    ]
    if kind == "PNG":
        names = (b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"sBIT", b"bKGD", b"tIME", b"eXIf")
        pieces = [(name, bytes(33)) for name in names]
    taken = 0
    for mode, (name, body) in itertools.product(["RGB", "L"] + ["P", "RGBA"] * (kind == "PNG"), pieces):
        for length in range(len(body) + 1):
            data = _with_piece(encoded(kind, mode=mode), name, body[:length])
            found = headers.read(data)
            if found is not None:
                taken += 1
                assert found == as_pillow_sees_it(data)
    assert taken > 200
