"""Images made smaller, with OpenCV and without it: alike, and the same images rejected."""

from __future__ import annotations

import functools
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageCms, ImageStat
from PIL.JpegImagePlugin import JpegImageFile, get_sampling

from batchkit import resizing
from batchkit.errors import RowError
from batchkit.images import ImageOptions, convert
from batchkit.preparation import prepare
from batchkit.progress import Silent
from batchkit.runs import Run
from tests.conftest import WriteTasks

WEB = frozenset({"image/jpeg", "image/png", "image/webp", "image/gif"})
LANCZOS = Image.Resampling.LANCZOS


def scene(size: tuple[int, int] = (600, 400), mode: str = "RGB") -> Image.Image:
    """Shades with edges, texture and colours."""
    shades = Image.radial_gradient("L").resize(size), Image.linear_gradient("L").resize(size)
    texture = Image.effect_noise((size[0] // 4, size[1] // 4), 40).resize(size, Image.Resampling.BICUBIC)
    picture = Image.merge("RGB", (shades[0], shades[1], texture))
    picture.paste("red", (size[0] // 5, size[1] // 5, size[0] // 2, size[1] // 2))
    return picture.convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **save: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **save)
    return out.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def difference(one: Image.Image, other: Image.Image) -> float:
    """The mean over all pixels and bands, of 255."""
    assert (one.size, one.mode) == (other.size, other.mode)
    means = ImageStat.Stat(ImageChops.difference(one, other)).mean
    return max(means)


@pytest.fixture
def opencv() -> Any:
    return pytest.importorskip("cv2")


@pytest.fixture
def by_pillow(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls something as if there were no OpenCV."""

    def call(work: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(resizing, "_opencv", lambda **_: None)
            return work()

    return call


@pytest.fixture
def calls(opencv: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes that OpenCV was asked for."""
    asked: list[tuple[int, int]] = []
    resize = opencv.resize

    def noted(image: Any, size: tuple[int, int], **how: Any) -> Any:
        asked.append(size)
        return resize(image, size, **how)

    monkeypatch.setattr(opencv, "resize", noted)
    return asked


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [(571, 390), (420, 280), (300, 200), (205, 137), (201, 395), (599, 140)])
def test_opencv_makes_what_lanczos_makes(calls: list[Any], mode: str, size: tuple[int, int]) -> None:
    image = scene() if mode == "RGB" else scene().getchannel("B")
    made, expected = resizing.resize(image, size, LANCZOS), image.resize(size, LANCZOS)
    assert calls == [size]
    assert difference(made, expected) < 1.5
    assert difference(image.resize(size, Image.Resampling.BILINEAR), expected) > difference(made, expected)


@pytest.mark.parametrize("size", [(199, 133), (700, 400), (1, 1)])
def test_what_is_made_much_smaller_or_larger_goes_by_pillow(calls: list[Any], size: tuple[int, int]) -> None:
    image = scene()
    expected = image.resize(size, LANCZOS, reducing_gap=2.0)
    assert resizing.resize(image, size, LANCZOS).tobytes() == expected.tobytes()
    assert calls == []


@pytest.mark.parametrize("mode", ["RGBA", "LA", "CMYK", "I;16"])
def test_other_modes_go_by_pillow(calls: list[Any], mode: str) -> None:
    image = scene(mode="L").convert(mode)
    made = resizing.resize(image, (300, 200), LANCZOS)
    assert (made.mode, made.tobytes()) == (mode, image.resize((300, 200), LANCZOS, reducing_gap=2.0).tobytes())
    assert calls == []


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 1), (1, 400), (40_000, 3)])
def test_images_of_few_pixels_in_a_direction_keep_their_shade(opencv: Any, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (10, 120, 250))
    wanted = (max(1, size[0] * 2 // 3), max(1, size[1] * 2 // 3))
    made = resizing.resize(image, wanted, LANCZOS)
    assert difference(made, Image.new("RGB", wanted, (10, 120, 250))) == 0


JPEGS: dict[str, Callable[[], bytes]] = {
    "baseline": lambda: encoded(scene(), quality=95),
    "progressive": lambda: encoded(scene(), quality=95, progressive=True),
    "4:4:4": lambda: encoded(scene(), quality=95, subsampling=0),
    "grey": lambda: encoded(scene(mode="L"), quality=95),
    "cmyk": lambda: encoded(scene(mode="CMYK"), quality=95),
    "restarts": lambda: encoded(scene(), quality=95, restart_marker_rows=2),
    "rgb": lambda: encoded(scene(), quality=95, keep_rgb=True),
    "large": lambda: encoded(scene((1500, 1000)), quality=92),
}


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("max_side", [250, 411, 560])
def test_a_jpeg_is_alike_with_opencv_and_without(
    opencv: Any, by_pillow: Callable[..., Any], kind: str, max_side: int
) -> None:
    options, data = ImageOptions(media_types=WEB, max_side=max_side), JPEGS[kind]()
    made, theirs = both(data, options, by_pillow)
    ours, pillows = opened(made.data), opened(theirs.data)
    assert made._replace(data=b"") == theirs._replace(data=b"")
    assert ours.mode == ("L" if kind == "grey" else "RGB")
    assert difference(ours, pillows) < 4
    assert ours.info.keys() == pillows.info.keys()
    assert subsampling(ours) == subsampling(pillows)


def subsampling(image: Image.Image) -> int:
    assert isinstance(image, JpegImageFile)
    return get_sampling(image)


def both(data: bytes, options: ImageOptions, by_pillow: Callable[..., Any]) -> tuple[Any, Any]:
    work = functools.partial(convert, data, options, name="x")
    return work(), by_pillow(work)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_lies_alike_with_opencv_and_without(
    opencv: Any, by_pillow: Callable[..., Any], orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(scene(), quality=95, exif=exif)
    ours, pillows = both(data, ImageOptions(media_types=WEB, max_side=411), by_pillow)
    assert difference(opened(ours.data), opened(pillows.data)) < 3
    assert opened(ours.data).getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_profiles_and_comments_are_as_pillow_leaves_them(opencv: Any, by_pillow: Callable[..., Any], kind: str) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encoded(scene(), kind, icc_profile=profile, **({"comment": b"by me"} if kind == "JPEG" else {}))
    ours, pillows = both(data, ImageOptions(media_types=WEB, max_side=411), by_pillow)
    left = [opened(made.data).info for made in (ours, pillows)]
    assert [info.get("icc_profile") for info in left] == [profile if kind == "PNG" else None] * 2
    assert [info.get("comment") for info in left] == [b"by me" if kind == "JPEG" else None] * 2


def outcome(work: Callable[[], Any]) -> tuple[int, int] | str:
    try:
        return opened(work().data).size
    except RowError as exc:
        return exc.message


@pytest.mark.parametrize("kind", ["baseline", "progressive", "grey", "restarts"])
def test_damaged_jpegs_are_rejected_alike(opencv: Any, by_pillow: Callable[..., Any], kind: str) -> None:
    chance = random.Random(kind)
    whole, options = JPEGS[kind](), ImageOptions(media_types=WEB, max_side=411)
    outcomes = []
    for number in range(60):
        data = bytearray(whole)
        if number % 3 == 0:
            del data[chance.randrange(2, len(data)) :]
        for _ in range(number % 4):
            data[chance.randrange(2, len(data))] = chance.randrange(256)
        if number % 5 == 0:
            at = chance.randrange(2, len(data))
            del data[at : at + chance.randrange(200)]
        work = functools.partial(convert, bytes(data), options, name="x")
        outcomes.append(outcome(work))
        assert outcomes[-1] == by_pillow(functools.partial(outcome, work))
    assert any(isinstance(one, str) for one in outcomes)
    assert any(isinstance(one, tuple) for one in outcomes)


class Told(Silent):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


WITHOUT = "import sys; sys.modules['cv2'] = None; "


ASK = "from PIL import Image; from batchkit import ownership, resizing, teams; "
SHRINK = "made = resizing.resize(Image.new('RGB', (60, 40)), (40, 20), Image.Resampling.LANCZOS); "


def python(code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return done.stdout.strip()


def test_without_opencv_pillow_does_it() -> None:
    said = python(WITHOUT + ASK + SHRINK + "print(made.size, resizing.libraries())")
    assert said.startswith("(40, 20) Pillow ")
    assert "OpenCV" not in said


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_our_own_process_has_one_thread_and_engines_have_theirs(opencv: Any) -> None:
    said = python(
        ASK + "import os; ownership.claim(); ownership.keep_memory(); " + SHRINK + "print(resizing.libraries(), "
        "teams.can_fork(), os.environ.get('OPENBLAS_NUM_THREADS'))"
    )
    assert said.endswith("True None")
    assert "OpenCV" in said


def test_opencv_has_its_threads_in_a_process_that_is_not_ours_alone(opencv: Any) -> None:
    said = python(ASK + SHRINK + "import cv2; print(cv2.getNumThreads())")
    assert said == python("import cv2; print(cv2.getNumThreads())")
    said = python("import cv2; cv2.setNumThreads(3); " + ASK + SHRINK + "print(cv2.getNumThreads())")
    assert said == "3"


def test_a_worker_that_was_forked_off_such_a_process_has_one(opencv: Any) -> None:
    said = python(
        "import cv2; cv2.setNumThreads(3); " + ASK + SHRINK + "ownership.claim(); " + SHRINK
        + "print(cv2.getNumThreads())"
    )  # fmt: skip
    assert said == "1"


@pytest.mark.parametrize("module", ["x = 1", "raise RuntimeError('no')"])
def test_an_opencv_that_is_broken_leaves_it_to_pillow(tmp_path: Path, module: str) -> None:
    (tmp_path / "cv2").mkdir()
    (tmp_path / "cv2" / "__init__.py").write_text(module)
    said = python(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); " + ASK + SHRINK + "print(resizing.libraries())")
    assert said.startswith("Pillow ")
    assert "OpenCV" not in said


def test_a_run_says_what_its_images_went_through(
    write_tasks: WriteTasks, tmp_path: Path, by_pillow: Callable[..., Any], opencv: Any
) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(scene()))
    tasks = write_tasks([{"id": str(number), "image": "a.jpg", "question": "?"} for number in range(4)])
    run, said = tmp_path / "run", Told()
    work = functools.partial(prepare, tasks, run, model="m", max_side=300, max_requests=2, workers=1, progress=said)
    work()
    assert "OpenCV" in Run.open(run).manifest.image_libraries
    (run / "prepared.json").unlink()
    (run / "requests" / "00001.json").unlink()
    by_pillow(work)
    assert [line for line in said.lines if "warning" in line and "Pillow" in line and "from shard 1 on" in line]
    assert json.loads((run / "prepared.json").read_bytes())["shards"] == 2

    work = functools.partial(prepare, tasks, tmp_path / "as-they-are", model="m")
    work()
    assert Run.open(tmp_path / "as-they-are").manifest.image_libraries == ""
