"""How model families resize images and cut them into tokens: pure arithmetic on sizes, no model and no network.

The counts are estimates: what a provider publishes, not what it bills. OpenAI says that billing may differ by one
token; Google calls its own rule rough. Where nothing is published for a model the answer is None, never a guess.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

Count = Callable[[int, int, str], int]
"""(width, height, detail) → tokens."""

Resize = Callable[[int, int, str, int | None], tuple[int, int]]
"""(width, height, detail, most pixels) → the size that the model makes of an image, larger or smaller."""


@dataclass(frozen=True)
class Family:
    """`has_area` says that the model has a limit on the area of its own, in whose place another may be given."""

    tokens: Count
    made: Resize
    has_area: bool = False


EXAMPLES = (
    "gpt-4o", "gpt-4.1", "gpt-4.1-mini", "gpt-5", "gpt-5-mini", "gpt-5.4", "gpt-5.6", "o3", "o4-mini",
    "gemini-2.5-flash", "gemini-3-pro", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "SmolVLM-256M", "SmolVLM2-2.2B",
    "Idefics3-8B", "gemma-3-4b",
)  # fmt: skip
"""One name of each kind that is known."""


def image_tokens(model: str, width: int, height: int, detail: str | None) -> int | None:
    """Input tokens of one image, or None where the rule of the model is not known.

    `width` and `height` are pixels as sent, at least 1 (ValueError). `detail` is the key of OpenAI's `image_url`: None
    and whatever the model does not know count as `auto`, the model's default. `model` may carry a provider
    (`openai/gpt-4o`), a folder, a date, or be a fine-tuned one (`ft:gpt-4o:…`).
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} × {height} pixels")
    family = family_of(model)
    return family.tokens(width, height, detail or "auto") if family is not None else None


def fitted_size(
    model: str, width: int, height: int, detail: str | None, max_pixels: int | None = None
) -> tuple[int, int]:
    """The size that the model would make of an image anyway; its own size where the model would enlarge a side.

    An image of that size is left as it is by the model: the same grid, the same tokens. `max_pixels` takes the place
    of the model's limit on the area, where it has one and this is lower. Raises ValueError for an unknown model.
    """
    family = family_of(model)
    if family is None:
        raise ValueError(f"no rule is known for {model!r}")
    across, down = family.made(width, height, detail or "auto", max_pixels)
    return (across, down) if across <= width and down <= height else (width, height)


def _fitted(width: int, height: int, side: int) -> tuple[int, int]:
    """Scaled down, never up, until no side is longer than `side`."""
    longest = max(width, height)
    if longest <= side:
        return width, height
    return max(1, round(width * side / longest)), max(1, round(height * side / longest))


def _cover(width: int, height: int, square: int) -> int:
    """How many squares it takes to cover an image; they may reach over its border."""
    return -(-width // square) * -(-height // square)


def _tiles(base: int, tile: int) -> Family:
    """OpenAI's tiles of 512 pixels. `low` costs the base alone, for a picture of 512 pixels; `auto` is as `high`.

    developers.openai.com/api/docs/guides/images-vision, «Tile-based image tokenization», 2026 (it lists gpt-5.6).
    """

    def made(width: int, height: int, detail: str, _most: int | None) -> tuple[int, int]:
        if detail == "low":
            return _fitted(width, height, 512)
        width, height = _fitted(width, height, 2048)
        short = min(width, height)
        return (width * 768 // short, height * 768 // short) if short > 768 else (width, height)

    def tokens(width: int, height: int, detail: str) -> int:
        return base if detail == "low" else base + tile * _cover(*made(width, height, detail, None), 512)

    return Family(tokens, made)


@dataclass(frozen=True)
class Limit:
    """What an image is scaled down to: pixels of its longer side, and patches of 32 × 32 pixels (None: any number)."""

    side: int
    patches: int | None = None


def _patches(percent: int, *, auto: Limit, low: Limit | None = None, **others: Limit) -> Family:
    """OpenAI's patches of 32 × 32 pixels; each costs `percent` / 100 tokens. Details not named are as `auto`.

    developers.openai.com/api/docs/guides/images-vision, «Patch-based image tokenization», 2026 (it lists
    gpt-5.6).
    """
    limits = {"auto": auto, "low": low or auto, **others}

    def made(width: int, height: int, detail: str, _most: int | None) -> tuple[int, int]:
        limit = limits.get(detail, auto)
        width, height = _fitted(width, height, limit.side)
        if limit.patches is not None and _cover(width, height, 32) > limit.patches:
            return _shrunk(width, height, limit.patches)
        return width, height

    def tokens(width: int, height: int, detail: str) -> int:
        return -(-_cover(*made(width, height, detail, None), 32) * percent // 100)

    return Family(tokens, made)


def _shrunk(width: int, height: int, budget: int) -> tuple[int, int]:
    """An image that needs more than `budget` patches, scaled down until a whole number of them spans a side."""
    shrink = math.sqrt(32 * 32 * budget / (width * height))
    across, down = width * shrink / 32, height * shrink / 32
    shrink *= min(math.floor(across) / across, math.floor(down) / down)
    return math.floor(width * shrink), math.floor(height * shrink)


def _gemini_size(width: int, height: int, _detail: str, _most: int | None) -> tuple[int, int]:
    """Gemini: scaled to 3072 pixels, firebase.google.com/docs/ai-logic/input-file-requirements, 2025.

    What is cut of that is published in two ways (`_gemini_tiles`), or not at all (Gemini 3): so no further.
    """
    return _fitted(width, height, 3072)


def _gemini_tiles(width: int, height: int, detail: str) -> int:
    """Gemini 2.0 and 2.5: 258 tokens a tile.

    ai.google.dev/gemini-api/docs/image-understanding, «Token calculation», 2026: up to 384 × 384 pixels 258 tokens;
    else tiles with sides of roughly floor(min(width, height) / 1.5). `low`:
    ai.google.dev/gemini-api/docs/media-resolution, «Token counts». That tiles are never smaller than 256 pixels, and
    images are first scaled to 3072: the page of `_gemini_size`. It also has tiles of at most 768 pixels, which would
    make images of more than 1152 dearer; the API's own pages have not.
    """
    if detail == "low":
        return 64
    if width <= 384 and height <= 384:
        return 258
    width, height = _fitted(width, height, 3072)
    return 258 * _cover(width, height, max(256, min(width, height) * 2 // 3))


def _levels(auto: int, **levels: int) -> Count:
    """Tokens that depend on the detail alone."""
    return lambda _width, _height, detail: levels.get(detail, auto)


def _qwen(factor: int, least: int, most: int) -> Family:
    """Qwen-VL: sides rounded to multiples of `factor`, the area kept between `least` and `most` pixels.

    `smart_resize` of transformers 5.19 (models/qwen2_vl), which vLLM 0.32 calls. That of qwen-vl-utils 0.0.14 differs
    for sides under half of `factor` alone. Limits: preprocessor_config.json of the models on huggingface.co/Qwen
    (min_pixels and max_pixels, or size.shortest_edge and longest_edge), which vLLM takes as they are; who serves a
    model may lower them, then this is an upper bound. Ratios over 200 : 1 are refused by the engine.
    """

    def grid(width: int, height: int, most: int) -> tuple[int, int]:
        across, down = round(width / factor), round(height / factor)
        if across * down * factor * factor > most:
            scale = math.sqrt(height * width / most)
            across = max(1, math.floor(width / scale / factor))
            down = max(1, math.floor(height / scale / factor))
        elif across * down * factor * factor < least:
            scale = math.sqrt(least / (height * width))
            across, down = math.ceil(width * scale / factor), math.ceil(height * scale / factor)
        return across, down

    def made(width: int, height: int, _detail: str, lower: int | None) -> tuple[int, int]:
        limit = min(most, lower or most)
        units = grid(width, height, limit)
        across, down = units[0] * factor, units[1] * factor
        if width * height > limit:  # also where one side is rounded up
            across, down = min(width, across), min(height, down)
        # So thin that the engine would refuse it, or resize it again: then as it is.
        stands = max(across, down) <= 200 * min(across, down) and grid(across, down, limit) == units
        return (across, down) if stands else (width, height)

    def tokens(width: int, height: int, _detail: str) -> int:
        across, down = grid(width, height, most)
        return across * down

    return Family(tokens, made, has_area=True)


def _idefics(tile: int, tokens_a_tile: int) -> Family:
    """Idefics3 and SmolVLM: the longer side becomes four tiles, and a picture of the whole is added.

    `Idefics3ImageProcessor` of transformers 5.19 (`_resize_output_size_rescale_to_max_len`), which vLLM 0.32 calls;
    tiles and tokens: preprocessor_config.json and processor_config.json (`image_seq_len`) of the models on
    huggingface.co. Tiles are filled by stretching: that is left to the model, for it takes pixels and brings none.
    """
    longest = 4 * tile

    def made(width: int, height: int, _detail: str, _most: int | None) -> tuple[int, int]:
        ratio = width / height
        if width >= height:
            return longest, _even(int(longest / ratio))
        return _even(int(longest * ratio)), longest

    def tokens(width: int, height: int, detail: str) -> int:
        return (_cover(*made(width, height, detail, None), tile) + 1) * tokens_a_tile

    return Family(tokens, made)


def _even(side: int) -> int:
    return max(1, side + side % 2)


def _square(side: int, tokens: int) -> Family:
    """Stretched to a square, whatever the ratio; a side that is shorter is left for the model to enlarge."""
    return Family(
        lambda _width, _height, _detail: tokens,
        lambda width, height, _detail, _most: (min(width, side), min(height, side)),
    )


_HIGH = Limit(2048, 2_500)
_ORIGINAL = Limit(6_000, 10_000)
_LARGE = Limit(2048, 6_144)
_SMALL = Limit(2048, 1_536)

_DATED = r"(-\d{4}-\d{2}-\d{2}|-latest|-preview)?$"
"""OpenAI's names end here: `-pro`, `-codex`, `-audio` … are other models, for which other rules may hold."""

_GEMINI = r"-(pro|flash|flash-lite)(-latest|-\d+|-(preview|exp)(?!.*(tts|image|live|audio)).*)?$"

# The first match holds. OpenAI: the guide named above, in the version of 2026 that lists gpt-5.6 and nothing later.
# Models marked «old» are no longer in its table of sizes, nor gpt-5-chat, gpt-4.5 and computer-use in that of tiles:
# for them the version before holds (1,536 patches). The factors are the newer ones: the version before had 1.62 for
# gpt-5-mini and 2.46 for gpt-5-nano, while users were billed 1.2 and 1.5 (community.openai.com/t/1377015).
_FAMILIES: tuple[tuple[str, Family], ...] = (
    (rf"gpt-5\.6(-sol|-terra|-luna)?{_DATED}", _patches(120, auto=Limit(65_535), low=Limit(512), high=_HIGH)),
    (rf"gpt-5\.5{_DATED}", _patches(120, auto=_ORIGINAL, low=Limit(512), high=_HIGH)),
    # `low` may cost more than `high` here: so it is published.
    (rf"gpt-5\.4(-mini|-nano)?{_DATED}", _patches(120, auto=_HIGH, low=_LARGE, original=_ORIGINAL)),
    (rf"gpt-5\.2{_DATED}", _patches(120, auto=_LARGE)),
    (rf"gpt-4\.1-mini{_DATED}", _patches(162, auto=_LARGE)),
    (rf"gpt-5-mini{_DATED}", _patches(120, auto=_SMALL)),  # old
    (rf"gpt-5-nano{_DATED}", _patches(150, auto=_SMALL)),  # old
    (rf"gpt-4\.1-nano{_DATED}", _patches(246, auto=_SMALL)),  # old
    (rf"o4-mini{_DATED}", _patches(172, auto=_SMALL)),  # old
    (rf"gpt-5(\.1|-chat)?{_DATED}", _tiles(70, 140)),
    (rf"gpt-4(o|\.1|\.5){_DATED}", _tiles(85, 170)),
    (rf"gpt-4o-mini{_DATED}", _tiles(2833, 5667)),
    (rf"(o1|o1-pro|o3){_DATED}", _tiles(75, 150)),
    (rf"computer-use{_DATED}", _tiles(65, 129)),
    # ai.google.dev/gemini-api/docs/media-resolution, «Token counts», 2026: the most that an image takes.
    (
        rf"gemini-3(\.\d+)?{_GEMINI}",
        Family(_levels(1120, low=280, medium=560, high=1120, ultra_high=2240), _gemini_size),
    ),
    (rf"gemini-2\.[05]{_GEMINI}", Family(_gemini_tiles, _gemini_size)),
    (r"qwen2(\.5)?-vl(-\d+b|$)", _qwen(28, 56 * 56, 16_384 * 28 * 28)),
    # Qwen3.5 and 3.6 have vision in every size. Names with another word (qwen3-vl-plus) are hosted, with other limits.
    (r"qwen3(-vl|\.[56])-\d+(\.\d+)?b|qwen3-vl$", _qwen(32, 256 * 256, 4096 * 4096)),
    (r"smolvlm2?-(256|500)m", _idefics(512, 64)),
    (r"smolvlm2-2\.2b|smolvlm-(instruct|base|synthetic)$", _idefics(384, 81)),
    (r"idefics3-8b", _idefics(364, 169)),
    # `image_seq_length` of transformers 5.19, models/gemma3/processing_gemma3.py, and the size in
    # preprocessor_config.json; pan and scan is off unless asked for.
    (r"gemma-3-(4|12|27)b", _square(896, 256)),
)


@lru_cache(maxsize=256)
def family_of(model: str) -> Family | None:
    """By the model's name alone; None where no rule is known."""
    name = model.rstrip("/").rpartition("/")[2].lower()
    if name.startswith("ft:"):
        name = name.split(":")[1]
    return next((family for pattern, family in _FAMILIES if re.match(pattern, name)), None)
