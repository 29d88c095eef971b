"""An image that many rows ask about is read and changed once; what is held of images is bounded."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from batchkit import images
from batchkit.errors import RowError
from batchkit.images import ImageOptions, Picture
from batchkit.pictures import OVERHEAD, PASSED, Memory, Pictures

OPTIONS = ImageOptions(media_types=frozenset({"image/jpeg", "image/png"}), max_side=16)


def jpeg(colour: str, size: tuple[int, int] = (64, 32)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that were really converted."""
    done: list[str] = []
    convert = images.convert

    def counted(data: bytes, options: ImageOptions, *, name: str) -> Picture:
        done.append(name)
        return convert(data, options, name=name)

    monkeypatch.setattr(images, "convert", counted)
    return done


def test_an_image_is_read_and_changed_once_for_all_its_rows(tmp_path: Path, conversions: list[str]) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg("red"))
    pictures = Pictures(tmp_path, OPTIONS)
    found = {pictures.load("a.jpg", name="(field)") for _ in range(5)}
    assert conversions == ["a.jpg"]
    assert found == {images.load("a.jpg", tmp_path, OPTIONS)}


def test_a_file_that_is_replaced_in_between_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg("red"))
    times = path.stat()
    pictures = Pictures(tmp_path, OPTIONS)
    before = pictures.load("a.jpg", name="x")
    other = tmp_path / "b.jpg"
    other.write_bytes(jpeg("blue"))
    assert other.stat().st_size == times.st_size
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy that keeps its times
    other.rename(path)
    after = pictures.load("a.jpg", name="x")
    assert after == images.load("a.jpg", tmp_path, OPTIONS)
    assert after != before


def test_a_file_that_vanishes_in_between_is_missed(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg("red"))
    pictures = Pictures(tmp_path, OPTIONS)
    pictures.load("a.jpg", name="x")
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(RowError, match="image not found"):
        pictures.load("a.jpg", name="x")


@pytest.mark.parametrize("as_reference", [bytes, lambda data: "data:;base64," + base64.b64encode(data).decode()])
def test_images_that_are_no_files_are_known_by_their_content(
    as_reference: Callable[[bytes], str | bytes], tmp_path: Path, conversions: list[str]
) -> None:
    pictures = Pictures(tmp_path, OPTIONS)
    first, again = (pictures.load(as_reference(jpeg("red")), name="one") for _ in range(2))
    other = pictures.load(as_reference(jpeg("blue")), name="other")
    assert len(conversions) == 2
    assert first == again != other
    assert other == images.load(as_reference(jpeg("blue")), tmp_path, OPTIONS)


def test_a_bad_image_is_rejected_for_each_of_its_rows(tmp_path: Path) -> None:
    pictures = Pictures(tmp_path, OPTIONS)
    for name in ("first", "second"):
        with pytest.raises(RowError, match=name):
            pictures.load(b"no image", name=name)


def made(size: int) -> Callable[[], Picture]:
    return lambda: Picture("image/png", bytes(size - OVERHEAD), 1)


def never() -> Picture:
    raise AssertionError("it was held")


def test_what_is_wanted_once_never_holds_more_than_its_part() -> None:
    memory = Memory(new_bytes=10_000, kept_bytes=50_000)
    for key in range(3 * PASSED):
        memory.get(key, made(1000))
        assert memory.size <= 10_000
    assert memory.size == 10_000


def test_what_is_wanted_again_stays_while_others_come_and_go() -> None:
    memory = Memory(new_bytes=10_000, kept_bytes=50_000)
    memory.get("often", made(1000))
    memory.get("often", never)
    for key in range(100):
        memory.get(key, made(1000))
        memory.get("often", never)


def test_what_comes_again_after_many_others_is_held_from_then_on() -> None:
    memory = Memory(new_bytes=10_000, kept_bytes=50_000)
    for key in range(40):
        memory.get(key, made(1000))
    for key in range(40):
        memory.get(key, made(1000))
    for key in range(40):
        memory.get(key, never)


def test_large_pictures_are_held_up_to_the_bound() -> None:
    memory = Memory(new_bytes=10_000, kept_bytes=50_000)
    for key in range(9):
        memory.get(key, made(20_000))
        memory.get(key, never)
        assert memory.size <= 60_000
    memory.get("too large", made(70_000))
    assert memory.size <= 60_000
