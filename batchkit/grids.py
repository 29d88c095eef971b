"""How model families cut images into tokens: pure arithmetic on sizes, no model and no network.

The counts are estimates: what a provider publishes, not what it bills. OpenAI says that billing may differ by one
token; Google calls its own rule rough. Where nothing is published for a model the answer is None, never a guess.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

Rule = Callable[[int, int, str], int]
"""(width, height, detail) → tokens."""


def image_tokens(model: str, width: int, height: int, detail: str | None) -> int | None:
    """Input tokens of one image, or None where the rule of the model is not known.

    `width` and `height` are pixels as sent, at least 1 (ValueError). `detail` is the key of OpenAI's `image_url`: None
    and whatever the model does not know count as `auto`, the model's default. `model` may carry a provider
    (`openai/gpt-4o`), a folder, a date, or be a fine-tuned one (`ft:gpt-4o:…`).
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} × {height} pixels")
    rule = _rule(model)
    return rule(width, height, detail or "auto") if rule is not None else None


def _fitted(width: int, height: int, side: int) -> tuple[int, int]:
    """Scaled down, never up, until no side is longer than `side`."""
    longest = max(width, height)
    if longest <= side:
        return width, height
    return max(1, round(width * side / longest)), max(1, round(height * side / longest))


def _cover(width: int, height: int, square: int) -> int:
    """How many squares it takes to cover an image; they may reach over its border."""
    return -(-width // square) * -(-height // square)


def _tiles(base: int, tile: int) -> Rule:
    """OpenAI's tiles of 512 pixels. `low` costs the base alone; `auto` costs what `high` costs.

    developers.openai.com/api/docs/guides/images-vision, «Tile-based image tokenization», 2026 (it lists gpt-5.6).
    """

    def tokens(width: int, height: int, detail: str) -> int:
        if detail == "low":
            return base
        width, height = _fitted(width, height, 2048)
        short = min(width, height)
        if short > 768:
            width, height = width * 768 // short, height * 768 // short
        return base + tile * _cover(width, height, 512)

    return tokens


@dataclass(frozen=True)
class Limit:
    """What an image is scaled down to: pixels of its longer side, and patches of 32 × 32 pixels (None: any number)."""

    side: int
    patches: int | None = None


def _patches(percent: int, *, auto: Limit, low: Limit | None = None, **others: Limit) -> Rule:
    """OpenAI's patches of 32 × 32 pixels; each costs `percent` / 100 tokens. Details not named are as `auto`.

    developers.openai.com/api/docs/guides/images-vision, «Patch-based image tokenization», 2026 (it lists
    gpt-5.6).
    """
    limits = {"auto": auto, "low": low or auto, **others}

    def tokens(width: int, height: int, detail: str) -> int:
        limit = limits.get(detail, auto)
        width, height = _fitted(width, height, limit.side)
        count = _cover(width, height, 32)
        if limit.patches is not None and count > limit.patches:
            count = _shrunk(width, height, limit.patches)
        return -(-count * percent // 100)

    return tokens


def _shrunk(width: int, height: int, budget: int) -> int:
    """Patches of an image that needs more than `budget`, once it is scaled down to them."""
    shrink = math.sqrt(32 * 32 * budget / (width * height))
    across, down = width * shrink / 32, height * shrink / 32
    shrink *= min(math.floor(across) / across, math.floor(down) / down)
    return min(budget, _cover(math.floor(width * shrink), math.floor(height * shrink), 32))


def _gemini_tiles(width: int, height: int, detail: str) -> int:
    """Gemini 2.0 and 2.5: 258 tokens a tile.

    ai.google.dev/gemini-api/docs/image-understanding, «Token calculation», 2026: up to 384 × 384 pixels 258 tokens;
    else tiles with sides of roughly floor(min(width, height) / 1.5). `low`:
    ai.google.dev/gemini-api/docs/media-resolution, «Token counts». That tiles are never smaller than 256 pixels, and
    images are first scaled to 3072: firebase.google.com/docs/ai-logic/input-file-requirements, 2025. That page also
    has tiles of at most 768 pixels, which would make images of more than 1152 dearer; the API's own pages have not.
    """
    if detail == "low":
        return 64
    if width <= 384 and height <= 384:
        return 258
    width, height = _fitted(width, height, 3072)
    return 258 * _cover(width, height, max(256, min(width, height) * 2 // 3))


def _levels(auto: int, **levels: int) -> Rule:
    """Tokens that depend on the detail alone."""
    return lambda _width, _height, detail: levels.get(detail, auto)


def _qwen(factor: int, least: int, most: int) -> Rule:
    """Qwen-VL: sides rounded to multiples of `factor`, the area kept between `least` and `most` pixels.

    `smart_resize` of transformers 5.19 (models/qwen2_vl), which vLLM 0.32 calls. That of qwen-vl-utils 0.0.14 differs
    for sides under half of `factor` alone. Limits: preprocessor_config.json of the models on huggingface.co/Qwen; who
    serves a model may lower them, then this is an upper bound. Ratios over 200 : 1 are refused by the engine.
    """

    def tokens(width: int, height: int, _detail: str) -> int:
        across, down = round(width / factor), round(height / factor)
        if across * down * factor * factor > most:
            scale = math.sqrt(height * width / most)
            across = max(1, math.floor(width / scale / factor))
            down = max(1, math.floor(height / scale / factor))
        elif across * down * factor * factor < least:
            scale = math.sqrt(least / (height * width))
            across, down = math.ceil(width * scale / factor), math.ceil(height * scale / factor)
        return across * down

    return tokens


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
_FAMILIES: tuple[tuple[str, Rule], ...] = (
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
    (rf"gemini-3(\.\d+)?{_GEMINI}", _levels(1120, low=280, medium=560, high=1120, ultra_high=2240)),
    (rf"gemini-2\.[05]{_GEMINI}", _gemini_tiles),
    (r"qwen2(\.5)?-vl-\d+b", _qwen(28, 56 * 56, 16_384 * 28 * 28)),
    # Qwen3.5 and 3.6 have vision in every size. Names without a size (qwen3-vl-plus) are hosted, with other limits.
    (r"qwen3(-vl|\.[56])-\d+(\.\d+)?b", _qwen(32, 256 * 256, 4096 * 4096)),
    # `image_seq_length` of transformers 5.19, models/gemma3/processing_gemma3.py; pan and scan is off unless asked for.
    (r"gemma-3-(4|12|27)b", _levels(256)),
)


@lru_cache(maxsize=256)
def _rule(model: str) -> Rule | None:
    name = model.rstrip("/").rpartition("/")[2].lower()
    if name.startswith("ft:"):
        name = name.split(":")[1]
    return next((rule for pattern, rule in _FAMILIES if re.match(pattern, name)), None)
