"""`--fit`: the model sees of a fitted image what it would have made of the original. Judged by the code of the models,
where there is such code, and by the providers' own examples."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from batchkit import preparation
from batchkit.cli import main
from batchkit.errors import UsageError
from batchkit.grids import EXAMPLES, family_of, fitted_size, image_tokens
from batchkit.images import ImageOptions, convert
from batchkit.runs import Run
from batchkit.sizes import bounded, sent_size
from tests.conftest import WriteTasks

WEB = frozenset({"image/jpeg", "image/png", "image/webp", "image/gif"})
SIDES = st.integers(1, 20_000)
DETAILS = st.sampled_from([None, "auto", "low", "high"])
QWEN = {
    "Qwen/Qwen2-VL-7B-Instruct": (28, 56 * 56, 16_384 * 28 * 28),
    "qwen2.5-vl": (28, 56 * 56, 16_384 * 28 * 28),
    "Qwen/Qwen3-VL-8B-Instruct": (32, 256 * 256, 4096 * 4096),
}
IDEFICS = {
    "HuggingFaceTB/SmolVLM-256M-Instruct": (512, 64),
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": (512, 64),
    "HuggingFaceTB/SmolVLM-Instruct": (384, 81),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": (384, 81),
    "HuggingFaceM4/Idefics3-8B-Llama3": (364, 169),
}


def photo(size: tuple[int, int], kind: str = "JPEG", **save: Any) -> bytes:
    out = io.BytesIO()
    Image.effect_noise((64, 64), 60).resize(size, Image.Resampling.BICUBIC).convert("RGB").save(out, kind, **save)
    return out.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def fitted(data: bytes, model: str, **options: Any) -> bytes:
    return convert(data, ImageOptions(media_types=WEB, fit=model, **options), name="x").data


# All families


@pytest.mark.parametrize("model", EXAMPLES)
def test_each_name_that_the_error_lists_is_known(model: str) -> None:
    assert family_of(model) is not None


@settings(max_examples=1500)
@example("gpt-4o", 1, 20_000, None)
@example("qwen2.5-vl", 41, 8190, None)
@example("gpt-5-mini", 20_000, 20_000, None)
@given(st.sampled_from([*EXAMPLES, *QWEN, *IDEFICS]), SIDES, SIDES, DETAILS)
def test_a_fitted_image_is_no_larger_has_the_same_tokens_and_fits(
    model: str, width: int, height: int, detail: str | None
) -> None:
    across, down = fitted_size(model, width, height, detail)
    assert 1 <= across <= width
    assert 1 <= down <= height
    assert image_tokens(model, across, down, detail) == image_tokens(model, width, height, detail)
    assert fitted_size(model, across, down, detail) == (across, down)


SIZES = st.tuples(SIDES, SIDES)


@given(st.sampled_from(EXAMPLES), SIZES, DETAILS, st.integers(1, 4000), st.integers(1, 4_000_000))
def test_of_fit_and_the_other_limits_the_smaller_wins(
    model: str, size: tuple[int, int], detail: str | None, side: int, area: int
) -> None:
    across, down = sent_size(*size, max_side=side, max_pixels=area, fit=model, detail=detail)
    assert max(across, down) <= side
    assert across * down <= max(area, across, down)  # a side is one pixel at least
    assert (across <= size[0], down <= size[1]) == (True, True)
    alone = fitted_size(model, *bounded(*size, side, None), detail)
    assert across * down <= alone[0] * alone[1]


# OpenAI


@pytest.mark.parametrize(
    ("model", "detail", "size", "made"),
    [
        ("gpt-4o", "high", (1024, 1024), (768, 768)),  # both of the guide: «Calculating costs»
        ("gpt-4o", None, (2048, 4096), (768, 1536)),
        ("gpt-4o", "low", (4096, 8192), (256, 512)),
        ("gpt-4o", "high", (768, 2048), (768, 2048)),
        ("gpt-4o", "high", (500, 400), (500, 400)),
        ("gpt-4.1", "high", (6000, 1000), (2048, 341)),
        ("o4-mini", "high", (1024, 1024), (1024, 1024)),
        ("o4-mini", "high", (1800, 2400), (1056, 1408)),  # the guide: 33 × 44 patches
        ("gpt-5-mini", "high", (4000, 3000), (1408, 1056)),
        ("gpt-5.6", None, (4000, 3000), (4000, 3000)),  # kept whole unless told otherwise
        ("gpt-5.6", "low", (4000, 3000), (512, 384)),
    ],
)
def test_openai_s_sizes(model: str, detail: str | None, size: tuple[int, int], made: tuple[int, int]) -> None:
    assert fitted_size(model, *size, detail) == made


@given(SIDES, SIDES)
def test_tiles_of_a_fitted_image_are_those_of_the_original(width: int, height: int) -> None:
    def tiles(across: float, down: float) -> tuple[int, int]:
        """As the guide says it, in fractions of a pixel."""
        shrink = min(1.0, 2048 / max(across, down))
        shrink *= min(1.0, 768 / (min(across, down) * shrink))
        return int(-(-across * shrink // 512)), int(-(-down * shrink // 512))

    made = fitted_size("gpt-4o", width, height, "high")
    assert max(made) <= 2048
    assert min(made) <= 768
    # Less than a pixel apart: where the guide's rule ends at a border of tiles, the rounding decides.
    at_border = {tiles(width * grown, height * grown) for grown in (1.0, 1 - 1e-3, 1 + 1e-3)}
    assume(len(at_border) == 1 and abs(max(made) / min(made) * min(width, height) / max(width, height) - 1) < 1e-3)
    assert tiles(*made) in at_border


# Qwen-VL: the oracle is the code that the engine runs


@pytest.fixture(scope="module")
def smart_resize() -> Callable[..., tuple[int, int]]:
    """`transformers` comes with vLLM."""
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    found: Callable[..., tuple[int, int]] = module.smart_resize
    return found


@settings(max_examples=1500)
@example(model="qwen2.5-vl", width=41, height=8190, area=None)  # fitted, its ratio would be over 200
@example(model="qwen2.5-vl", width=60_000, height=300, area=None)
@example(model="qwen2.5-vl", width=1003, height=1003, area=1_003_520)
@given(
    model=st.sampled_from(list(QWEN)),
    width=SIDES,
    height=SIDES,
    area=st.none() | st.integers(100_000, 20_000_000) | st.just(1_003_520),
)
def test_qwen_makes_the_same_grid_of_a_fitted_image(
    smart_resize: Callable[..., tuple[int, int]], model: str, width: int, height: int, area: int | None
) -> None:
    factor, least, most = QWEN[model]
    limits = {"factor": factor, "min_pixels": least, "max_pixels": min(most, area or most)}
    across, down = sent_size(width, height, max_pixels=area, fit=model)
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(ValueError, match="aspect ratio"):
            smart_resize(height, width, **limits)
        return
    expected = smart_resize(height, width, **limits)
    # Else so thin that the engine would refuse what it makes of the image, or resize that again.
    stands = max(expected) <= 200 * min(expected) and smart_resize(*expected, **limits) == expected
    if not stands:
        assert across * down <= area if area is not None else (across, down) == (width, height)
        return
    assert smart_resize(down, across, **limits) == expected
    if expected[0] <= height and expected[1] <= width:
        assert (down, across) == expected


@pytest.mark.parametrize("size", [(1210, 820), (510, 1021), (900, 100), (57, 30), (2500, 20)])
def test_qwen_s_own_processor_sees_the_same_grid(size: tuple[int, int]) -> None:
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    data = photo(size, "PNG")
    for model, (factor, least, most) in QWEN.items():
        processor = module.Qwen2VLImageProcessorPil(
            patch_size=factor // 2, size={"shortest_edge": least, "longest_edge": most}
        )
        grids = [
            processor(opened(each), return_tensors="np")["image_grid_thw"][0].tolist()
            for each in (data, fitted(data, model))
        ]
        assert grids[0] == grids[1]
        assert grids[0][1] * grids[0][2] // 4 == image_tokens(model, *size, None)


def test_qwen_s_processor_leaves_a_fitted_image_as_it_is() -> None:
    numpy = pytest.importorskip("numpy")
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    processor = module.Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 500_000})
    data = photo((1500, 1000), "PNG")
    small = fitted(data, "qwen2.5-vl", max_pixels=500_000)
    assert opened(small).size == (840, 560)
    before, after = (processor(opened(each), return_tensors="np") for each in (data, small))
    assert before["image_grid_thw"].tolist() == after["image_grid_thw"].tolist()
    unscaled = processor(opened(small), do_resize=False, return_tensors="np")
    assert numpy.array_equal(after["pixel_values"], unscaled["pixel_values"])
    # The resampling differs (bicubic there, Lanczos here), what is on the picture does not: values span -1.8 to 2.1.
    assert numpy.abs(before["pixel_values"] - after["pixel_values"]).mean() < 0.02


# Idefics3 and SmolVLM


@settings(max_examples=600)
@given(st.sampled_from(list(IDEFICS)), SIDES, SIDES)
def test_idefics_makes_the_same_tiles_of_a_fitted_image(model: str, width: int, height: int) -> None:
    module = pytest.importorskip("transformers.models.idefics3.image_processing_pil_idefics3")
    tile, tokens = IDEFICS[model]
    processor = module.Idefics3ImageProcessorPil(size={"longest_edge": 4 * tile}, max_image_size={"longest_edge": tile})
    across, down = fitted_size(model, width, height, None)
    expected = processor.get_number_of_image_patches(height, width)
    assert processor.get_number_of_image_patches(down, across) == expected
    assert image_tokens(model, width, height, None) == expected[0] * tokens
    first = module.get_resize_output_image_size  # the step that a fitted image has behind it
    if max(width, height) <= 6000:
        blank = pytest.importorskip("numpy").broadcast_to(0, (3, height, width))
        made = first(blank, resolution_max_side=4 * tile)
        expected_size = (made[1], made[0]) if made[1] <= width and made[0] <= height else (width, height)
        assert (across, down) == expected_size


@pytest.mark.parametrize("size", [(2500, 1300), (1000, 3000), (5000, 300), (800, 600)])
def test_smolvlm_s_own_processor_sees_the_same_picture(size: tuple[int, int]) -> None:
    numpy = pytest.importorskip("numpy")
    module = pytest.importorskip("transformers.models.smolvlm.image_processing_pil_smolvlm")
    processor = module.SmolVLMImageProcessorPil(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512})
    data = photo(size, "PNG")
    small = fitted(data, "SmolVLM-256M-Instruct")
    assert (opened(small).size == size) == (max(size) <= 2048)
    before, after = (processor(opened(each), return_tensors="np", return_row_col_info=True) for each in (data, small))
    assert (before["rows"], before["cols"]) == (after["rows"], after["cols"])
    assert before["pixel_values"].shape == after["pixel_values"].shape
    # Both shrink by Lanczos; values span 2.
    assert numpy.abs(before["pixel_values"] - after["pixel_values"]).mean() < 0.02


def test_gemma_s_own_processor_sees_the_same_picture() -> None:
    numpy = pytest.importorskip("numpy")
    module = pytest.importorskip("transformers.models.gemma3.image_processing_pil_gemma3")
    processor = module.Gemma3ImageProcessorPil(size={"height": 896, "width": 896})
    data = photo((3000, 500), "PNG")
    small = fitted(data, "google/gemma-3-4b-it")
    assert opened(small).size == (896, 500)  # the height is left for the model to enlarge
    before, after = (processor(opened(each), return_tensors="np")["pixel_values"] for each in (data, small))
    assert before.shape == after.shape
    assert numpy.abs(before - after).mean() < 0.02


# Bytes


@pytest.mark.parametrize("model", EXAMPLES)
def test_an_image_that_the_model_would_enlarge_or_take_as_it_is_keeps_its_bytes(model: str) -> None:
    for size in [(20, 30), (300, 200)]:
        data = photo(size)
        if fitted_size(model, *size, None) == size:
            assert fitted(data, model) == data
    assert opened(fitted(photo((20, 30)), model)).size == (20, 30)


def test_a_fitted_image_has_fewer_bytes_and_its_format() -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        data = photo((3000, 2000), kind)
        small = fitted(data, "gpt-4o")
        assert len(small) < len(data)
        assert (opened(small).format, opened(small).size) == (kind, (1152, 768))


def test_bytes_never_grow_by_fitting_alone() -> None:
    data = photo((1010, 1010), quality=30)
    assert fitted_size("qwen2.5-vl", 1010, 1010, None) == (1008, 1008)
    assert fitted(data, "qwen2.5-vl") == data
    # Another format, or a limit that was asked for, is a reason of its own.
    assert opened(fitted(data, "qwen2.5-vl", format="png")).size == (1008, 1008)
    assert opened(fitted(data, "qwen2.5-vl", max_side=1009)).size == (1008, 1008)


def test_a_picture_that_lies_on_its_side_is_fitted_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    small = opened(fitted(photo((4000, 3000), exif=exif), "smolvlm-256m"))
    assert small.size == fitted_size("smolvlm-256m", 3000, 4000, None) == (1536, 2048)


def test_detail_decides_where_the_model_knows_it() -> None:
    data = photo((3000, 2000))
    assert opened(fitted(data, "gpt-4o", detail="low")).size == (512, 341)
    assert opened(fitted(data, "gpt-4o", detail="high")).size == (1152, 768)


def test_options_travel_to_other_processes() -> None:
    options = ImageOptions(media_types=WEB, fit="gpt-4o", detail="low")
    assert pickle.loads(pickle.dumps(options)) == options  # noqa: S301  # our own


# The option


def test_an_unknown_model_is_refused_with_those_that_are_known(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"question": "a"}])
    done = CliRunner().invoke(main, ["prepare", str(tasks), str(tmp_path / "run"), "--model", "m", "--fit", "nonsense"])
    assert done.exit_code == 2
    assert "Error: --fit: no rule is known for 'nonsense'; known are models such as gpt-4o, " in done.stderr
    assert not (tmp_path / "run").exists()


def test_prepare_fits_images(picture: Callable[..., Path], write_tasks: WriteTasks, tmp_path: Path) -> None:
    picture("a.png", (3000, 2000))
    tasks = write_tasks([{"image": "a.png", "question": "a"}])
    report = preparation.prepare(tasks, tmp_path / "run", model="m", fit="gpt-4o")
    assert report.warnings == []
    assert Run.open(tmp_path / "run").manifest.options["fit"] == "gpt-4o"
    assert [seal.pixels for seal in Run.open(tmp_path / "run").seals()] == [1152 * 768]


def test_another_model_s_size_is_warned_of(picture: Callable[..., Path], write_tasks: WriteTasks) -> None:
    tasks = write_tasks([{"question": "a"}])
    (warning,) = preparation.plan(tasks, model="Qwen/Qwen2.5-VL-7B-Instruct", fit="gpt-4o").warnings
    assert warning.startswith("images are shrunk to what gpt-4o makes of them, but Qwen/Qwen2.5-VL-7B-Instruct is")
    assert not preparation.plan(tasks, model="Qwen/Qwen2.5-VL-7B-Instruct", fit="qwen2-vl").warnings


def test_requests_that_are_kept_are_not_fitted(write_tasks: WriteTasks) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": []}}
    with pytest.raises(UsageError, match="--fit has no meaning for rows that are requests"):
        preparation.plan(write_tasks([line]), model="m", fit="gpt-4o")
