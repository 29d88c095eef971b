"""Image tokens: the providers' own examples, and sizes counted by the code that engines run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchkit.grids import image_tokens

# developers.openai.com/api/docs/guides/images-vision: gpt-5.4 in the version of 2026 that lists gpt-5.6, the others in
# the one before.
OPENAI = [
    ("gpt-4o", 1024, 1024, "high", 765),
    ("gpt-4o", 2048, 4096, "high", 1105),
    ("gpt-4o", 4096, 8192, "low", 85),
    ("gpt-5.4", 1024, 1024, "high", 1229),
    ("gpt-5.4", 2048, 2048, "high", 3000),
    # The guide counts 1,024 and 1,452 patches; the factor of o4-mini is 1.72.
    ("o4-mini", 1024, 1024, None, 1762),
    ("o4-mini", 1800, 2400, None, 2498),
]

# Bills that users measured: community.openai.com/t/1377015 and «GPT-5-mini image input token calculation», 2026-06.
MEASURED = [
    ("gpt-5-mini", 256, 256, 77),
    ("gpt-5-mini", 512, 512, 308),
    ("gpt-5-mini", 768, 1024, 922),
    ("gpt-5-mini", 1280, 720, 1104),
    ("gpt-5-mini", 1024, 1024, 1229),
    ("gpt-5-mini", 2048, 768, 1844),
    ("gpt-5.4-mini", 1600, 1600, 3000),
]

# `smart_resize` of qwen-vl-utils 0.0.14, called with the limits of the models; transformers 5.19 gives the same.
QWEN = [
    (28, 1, 1, 4),
    (28, 42, 70, 4),
    (28, 100, 100, 16),
    (28, 640, 480, 391),
    (28, 1024, 1024, 1369),
    (28, 1920, 1080, 2691),
    (28, 3000, 4000, 15301),
    (28, 5000, 5000, 16129),
    (28, 8192, 300, 3223),
    (28, 10000, 50, 714),
    (32, 1, 1, 64),
    (32, 42, 70, 77),
    (32, 100, 100, 64),
    (32, 640, 480, 300),
    (32, 1024, 1024, 1024),
    (32, 1920, 1080, 2040),
    (32, 3000, 4000, 11750),
    (32, 5000, 5000, 16384),
    (32, 8192, 300, 2304),
    (32, 30, 5000, 156),
]

KNOWN = [
    "gpt-4o",
    "gpt-4o-mini",
    "gpt-4.1",
    "gpt-4.1-mini",
    "gpt-4.1-nano",
    "gpt-5",
    "gpt-5-mini",
    "gpt-5-nano",
    "gpt-5.1",
    "gpt-5.2",
    "gpt-5.4",
    "gpt-5.5",
    "gpt-5.6-sol",
    "o1",
    "o3",
    "o4-mini",
    "gemini-2.5-flash",
    "gemini-3-flash-preview",
    "Qwen/Qwen2-VL-2B-Instruct",
    "Qwen/Qwen3-VL-8B-Instruct",
    "google/gemma-3-4b-it",
]
SIDES = st.integers(1, 20_000)
DETAILS = st.sampled_from([None, "auto", "low", "high", "original", "of another provider"])


@pytest.mark.parametrize(("model", "width", "height", "detail", "tokens"), OPENAI)
def test_openai_s_own_examples(model: str, width: int, height: int, detail: str | None, tokens: int) -> None:
    assert image_tokens(model, width, height, detail) == tokens
    assert image_tokens(model, height, width, detail) == tokens


@pytest.mark.parametrize(("model", "width", "height", "tokens"), MEASURED)
def test_what_openai_billed(model: str, width: int, height: int, tokens: int) -> None:
    assert image_tokens(model, width, height, "high") == tokens


@pytest.mark.parametrize(
    ("model", "low", "high"),
    [
        ("gpt-4o-mini", 2833, 2833 + 4 * 5667),
        ("gpt-4.1", 85, 85 + 4 * 170),
        ("gpt-5", 70, 70 + 4 * 140),
        ("o1", 75, 75 + 4 * 150),
        ("computer-use-preview", 65, 65 + 4 * 129),
    ],
)
def test_tiles_cost_a_base_and_an_amount_each(model: str, low: int, high: int) -> None:
    assert image_tokens(model, 1024, 1024, "low") == low
    assert image_tokens(model, 1024, 1024, "high") == high
    assert image_tokens(model, 1024, 1024, "auto") == high
    assert image_tokens(model, 1024, 1024, None) == high


def test_newer_models_keep_large_images_whole_unless_told_otherwise() -> None:
    def tokens(model: str, detail: str | None) -> int | None:
        return image_tokens(model, 8000, 4000, detail)

    assert tokens("gpt-5.6-sol", None) == -(-250 * 125 * 12 // 10)
    assert tokens("gpt-5.6-sol", "original") == tokens("gpt-5.6-sol", "auto") == tokens("gpt-5.6-sol", None)
    assert tokens("gpt-5.6-sol", "high") == -(-64 * 32 * 12 // 10)
    assert tokens("gpt-5.6-sol", "low") == -(-16 * 8 * 12 // 10)
    original = tokens("gpt-5.5", None)
    assert original is not None
    assert original <= 12_000
    assert tokens("gpt-5.4", "original") == original
    assert tokens("gpt-5.4", None) == tokens("gpt-5.4", "high") == tokens("gpt-5.6-sol", "high")


def test_low_may_cost_more_than_high_as_published() -> None:
    low, high = (image_tokens("gpt-5.4-nano", 2048, 2048, detail) for detail in ("low", "high"))
    assert (low, high) == (-(-4096 * 12 // 10), 3000)


@pytest.mark.parametrize(
    ("width", "height", "detail", "tokens"),
    [
        (384, 384, None, 258),
        (960, 540, None, 6 * 258),  # the example of ai.google.dev/gemini-api/docs/image-understanding
        (1000, 1000, "high", 4 * 258),
        (4000, 4000, "auto", 4 * 258),
        (385, 100, None, 2 * 258),
        (960, 540, "low", 64),
    ],
)
@pytest.mark.parametrize("model", ["gemini-2.5-pro", "models/gemini-2.0-flash-001", "google/gemini-2.5-flash-lite"])
def test_gemini_2_counts_tiles(model: str, width: int, height: int, detail: str | None, tokens: int) -> None:
    assert image_tokens(model, width, height, detail) == tokens


@pytest.mark.parametrize(
    ("detail", "tokens"), [(None, 1120), ("auto", 1120), ("low", 280), ("medium", 560), ("high", 1120)]
)
@pytest.mark.parametrize("model", ["gemini-3-pro-preview", "gemini-3.5-flash", "models/gemini-3.1-flash-lite"])
def test_gemini_3_counts_by_resolution(model: str, detail: str | None, tokens: int) -> None:
    assert image_tokens(model, 123, 4567, detail) == tokens


@pytest.mark.parametrize(("factor", "width", "height", "tokens"), QWEN)
def test_qwen_counts_as_its_own_code_does(factor: int, width: int, height: int, tokens: int) -> None:
    for model in {
        28: ("Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen2.5-VL-72B-Instruct-AWQ"),
        32: ("Qwen/Qwen3-VL-30B-A3B-Instruct", "Qwen/Qwen3.5-0.8B", "Qwen/Qwen3.6-35B-A3B"),
    }[factor]:
        assert image_tokens(model, width, height, None) == tokens


@pytest.mark.parametrize(
    "model",
    [
        "gpt-4o",
        "openai/gpt-4o",
        "GPT-4o",
        "gpt-4o-2024-11-20",
        "ft:gpt-4o-2024-08-06:acme::abc123",
        "/models/gpt-4o/",
    ],
)
def test_a_name_may_have_a_provider_a_date_a_folder(model: str) -> None:
    assert image_tokens(model, 1024, 1024, None) == 765


@pytest.mark.parametrize(
    "model",
    [
        "",
        "my-deployment",
        "gpt-3.5-turbo",
        "gpt-4o-audio-preview",
        "gpt-5-pro",
        "gpt-5.1-codex",
        "gpt-5.4-pro",
        "gpt-6-sol",
        "gpt-image-1",
        "o3-pro",
        "gemini-1.5-flash",
        "gemini-2.5-flash-image",
        "gemini-4-argon",
        "gemini-flash-latest",
        "qwen3-vl-plus",
        "qwen-vl-max",
        "Qwen/Qwen2.5-7B-Instruct",
        "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    ],
)
def test_a_model_without_a_published_rule_is_unknown(model: str) -> None:
    assert image_tokens(model, 1024, 1024, None) is None
    assert image_tokens(model, 1, 1, "low") is None


def test_an_image_has_pixels() -> None:
    with pytest.raises(ValueError, match="0 × 5 pixels"):
        image_tokens("gpt-4o", 0, 5, None)


@given(st.sampled_from(KNOWN), SIDES, SIDES, DETAILS)
def test_known_models_count_every_image(model: str, width: int, height: int, detail: str | None) -> None:
    tokens = image_tokens(model, width, height, detail)
    assert tokens is not None
    assert tokens >= 1
    if "Qwen" not in model:  # rounding half to even is symmetric as well, but scaling up may not be
        assert tokens == image_tokens(model, height, width, detail)


@given(st.sampled_from(["gpt-4o", "gpt-5", "gpt-5.6-sol"]), st.integers(1, 2048), st.integers(1, 2048), st.data())
def test_a_larger_image_costs_no_less_while_nothing_is_scaled(
    model: str, width: int, height: int, data: st.DataObject
) -> None:
    if model != "gpt-5.6-sol":
        width, height = min(width, 768), min(height, 768)
    smaller = data.draw(st.integers(1, width)), data.draw(st.integers(1, height))
    less, more = image_tokens(model, *smaller, None), image_tokens(model, width, height, None)
    assert less is not None
    assert more is not None
    assert less <= more


@given(st.sampled_from([("gpt-5-mini", 1536, 120), ("gpt-5.4", 2500, 120), ("gpt-5.5", 10_000, 120)]), SIDES, SIDES)
def test_patches_stay_within_the_budget(rule: tuple[str, int, int], width: int, height: int) -> None:
    model, budget, percent = rule
    tokens = image_tokens(model, width, height, None)
    assert tokens is not None
    assert tokens <= -(-budget * percent // 100)


@given(st.sampled_from([("Qwen2.5-VL-7B", 4, 16_384), ("Qwen3-VL-8B", 64, 16_384)]), SIDES, SIDES)
def test_qwen_stays_within_its_limits(rule: tuple[str, int, int], width: int, height: int) -> None:
    model, least, most = rule
    tokens = image_tokens(model, width, height, None)
    assert tokens is not None
    assert least <= tokens
    if max(width, height) <= 200 * min(width, height):  # beyond, the engine refuses
        assert tokens <= most
