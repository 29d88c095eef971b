from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from batchkit.errors import RowError
from batchkit.images import ImageOptions, convert, is_truncated, load

WEB = frozenset({"image/jpeg", "image/png", "image/webp", "image/gif"})


def encoded(kind: str, size: tuple[int, int] = (40, 20), mode: str = "RGB", **save: object) -> bytes:
    out = io.BytesIO()
    image = Image.effect_noise(size, 60).convert(mode)
    image.save(out, kind, **save)
    return out.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_formats_that_the_target_takes_pass_byte_for_byte(kind: str) -> None:
    data = encoded(kind)
    picture = convert(data, ImageOptions(media_types=WEB), name="x")
    assert picture.data == data
    assert picture.media_type == f"image/{kind.lower()}"
    assert picture.pixels == 800


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM"])
def test_other_formats_are_re_encoded_without_loss(kind: str) -> None:
    data = encoded(kind)
    picture = convert(data, ImageOptions(media_types=WEB), name="x")
    assert picture.media_type == "image/png"
    assert opened(picture.data).convert("RGB").tobytes() == opened(data).convert("RGB").tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
def test_a_cut_off_image_is_rejected(kind: str, keep: float) -> None:
    data = encoded(kind, size=(200, 200))
    with pytest.raises(RowError, match=r"x\.img") as caught:
        convert(data[: int(len(data) * keep)], ImageOptions(media_types=WEB), name="x.img")
    assert caught.value.code == "image"


def test_a_cut_off_jpeg_is_seen_behind_the_thumbnail_in_its_header() -> None:
    thumbnail = encoded("JPEG", size=(16, 16))
    exif = b"\xff\xe1" + (len(thumbnail) + 8).to_bytes(2, "big") + b"Exif\x00\x00" + thumbnail
    whole = encoded("JPEG", size=(300, 300))
    data = whole[:2] + exif + whole[2:]
    assert not is_truncated(data, "JPEG")
    assert is_truncated(data[:-200], "JPEG")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_bytes_behind_the_end_are_harmless(kind: str) -> None:
    data = encoded(kind) + b"\x00" * 20 + b"trailer"
    assert convert(data, ImageOptions(media_types=WEB), name="x").data == data


def test_max_side_shrinks_and_never_enlarges() -> None:
    options = ImageOptions(media_types=WEB, max_side=20)
    assert opened(convert(encoded("JPEG"), options, name="x").data).size == (20, 10)
    small = encoded("JPEG", size=(20, 3))
    assert convert(small, options, name="x").data == small


def test_max_pixels_bounds_the_area() -> None:
    width, height = opened(convert(encoded("PNG"), ImageOptions(media_types=WEB, max_pixels=200), name="x").data).size
    assert width * height <= 200
    assert (width, height) == (20, 10)


def test_a_long_thin_image_keeps_at_least_one_pixel() -> None:
    picture = convert(encoded("PNG", size=(4000, 2)), ImageOptions(media_types=WEB, max_side=100), name="x")
    assert opened(picture.data).size == (100, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("max_side", [None, 16])
def test_orientation_is_applied_where_an_image_is_re_encoded(orientation: int, max_side: int | None) -> None:
    image = Image.new("RGB", (64, 32), "white")
    image.paste("black", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    image.save(out, "JPEG", exif=exif, quality=95)
    options = ImageOptions(media_types=WEB, format="png", max_side=max_side)
    got = opened(convert(out.getvalue(), options, name="x").data).convert("L")
    factor = 1 if max_side is None else max_side / 64
    wide, high = (32, 64) if orientation >= 5 else (64, 32)
    assert got.size == (wide * factor, high * factor)
    corner = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}[orientation]
    small = got.resize((10, 10), Image.Resampling.BOX).tobytes()
    assert [(x, y) for y in (0, 1) for x in (0, 1) if small[90 * y + 9 * x] < 100] == [corner]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
@pytest.mark.parametrize("target", ["jpeg", "png", "webp"])
def test_every_mode_can_be_re_encoded(mode: str, target: str) -> None:
    out = io.BytesIO()
    Image.linear_gradient("L").convert("RGB" if mode == "P" else "L").convert(mode).save(out, "TIFF")
    picture = convert(out.getvalue(), ImageOptions(media_types=WEB, format=target), name="x")  # type: ignore[arg-type]
    assert picture.media_type == f"image/{target}"
    levels = opened(picture.data).convert("L").resize((1, 16), Image.Resampling.BOX).tobytes()
    assert levels[0] < 60
    assert levels[15] > 190
    assert all(before <= after + 8 for before, after in itertools.pairwise(levels))


def test_transparency_becomes_white_in_jpeg() -> None:
    out = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(out, "PNG")
    picture = convert(out.getvalue(), ImageOptions(media_types=WEB, format="jpeg"), name="x")
    assert min(opened(picture.data).convert("L").tobytes()) > 250


def test_a_decompression_bomb_is_rejected_by_its_header() -> None:
    bomb = bytearray(encoded("PNG", size=(1, 1)))
    bomb[16:24] = (30_000).to_bytes(4, "big") * 2
    import zlib

    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    with pytest.raises(RowError, match="pixels"):
        convert(bytes(bomb), ImageOptions(media_types=WEB), name="x")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "image is empty"),
        (b"<!DOCTYPE html><html>", "begins like HTML"),
        (b"not an image at all", "not an image that can be read"),
    ],
)
def test_what_is_no_image_says_what_it_is(data: bytes, message: str) -> None:
    with pytest.raises(RowError, match=message):
        convert(data, ImageOptions(media_types=WEB), name="x")


@pytest.mark.parametrize("name", ["a b.png", "ü#1?.png", "100%20.png"])
def test_names_are_taken_literally_and_file_uris_decoded(
    name: str, picture: Callable[..., Path], tmp_path: Path
) -> None:
    path = picture(name)
    options = ImageOptions(media_types=WEB)
    assert load(name, tmp_path, options).data == path.read_bytes()
    assert load(str(path), Path("/"), options).data == path.read_bytes()
    assert load(path.as_uri(), Path("/"), options).data == path.read_bytes()


def test_data_urls_are_checked_like_files(tmp_path: Path) -> None:
    data = encoded("PNG")
    url = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    assert load(url, tmp_path, ImageOptions(media_types=WEB))[:3] == ("image/png", data, 800)
    with pytest.raises(RowError, match="not valid base64"):
        load("data:image/png;base64,@@@", tmp_path, ImageOptions(media_types=WEB))


def test_postscript_is_not_run() -> None:
    with pytest.raises(RowError, match="EPS is a program, not an image that is read: x"):
        convert(encoded("EPS"), ImageOptions(media_types=WEB), name="x.eps")


def test_a_file_too_large_for_an_image_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "huge.png", "wb") as stream:
        stream.truncate(1 << 40)  # a hole: it takes no room
    with pytest.raises(RowError, match="image file has 1,099,511,627,776 bytes, more than"):
        load("huge.png", tmp_path, ImageOptions(media_types=WEB))


@pytest.mark.parametrize("reference", ["file://[x/a.png", "a\0.png", "x" * 300, "/" * 3 + "x/" * 2500])
def test_a_reference_that_is_no_path_is_an_error_of_its_row(reference: str, tmp_path: Path) -> None:
    with pytest.raises(RowError) as caught:
        load(reference, tmp_path, ImageOptions(media_types=WEB))
    assert len(caught.value.message) < 400


def test_a_missing_image_is_named_as_the_row_names_it(tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"^image not found: photos/17\.jpg$"):
        load("photos/17.jpg", tmp_path, ImageOptions(media_types=WEB))


@pytest.mark.parametrize(("reference", "message"), [("/dev/zero", "not a regular file"), ("/", "a directory")])
def test_only_files_are_read(reference: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RowError, match=f"^image is {message}: {reference}$"):
        load(reference, tmp_path, ImageOptions(media_types=WEB))
