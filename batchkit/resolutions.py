"""What a run would take if its images were sent in other sizes, side by side: for `prepare --plan`.

Sizes and tokens are exact, from the headers of all images. Bytes are exact where an image goes as it is; of those that
would be made smaller, a few, spread evenly over the run, are made so, and stand for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import msgspec

from batchkit.conversion import Converted, Converter
from batchkit.errors import RowError
from batchkit.grids import family_of, image_tokens
from batchkit.images import Given, ImageOptions, Picture, convert
from batchkit.measures import Totals
from batchkit.options import PrepareOptions
from batchkit.pricing import estimate
from batchkit.sizes import sent_size
from batchkit.tasks import Row

SIDES = (1024, 768, 512)
"""From the largest to the smallest."""

SAMPLED = 200
"""So many images are made smaller. Once there are more, every other one of them is forgotten, and of those that follow
only every other one is taken: half as many at least, however many images there are."""


class Resolution(msgspec.Struct, frozen=True, kw_only=True):
    """`name` is `as given`, `unchanged`, or the option that asks for it; `shrunk` images would be made smaller for it.

    `usd` is the price as a batch: of the input alone where the longest answer is not known, None where no price is.
    `image_tokens` and `usd` are of the requests to send. `sampled` images stand for those whose bytes are not known;
    it is None where `requests_bytes` is exact. `shards` is exact of what is given alone.
    """

    name: str
    shrunk: int
    image_tokens: int | None
    requests_bytes: int
    shards: int
    usd: float | None
    sampled: int | None


class _Measured(NamedTuple):
    """An image of the sample: which one, its bytes as given, and as each way makes them (None: known without)."""

    number: int
    given: int
    made: list[int | None]


@dataclass
class _Sum:
    """Of one way: `known` are base64 characters; `open_bytes` those given of images whose bytes are not known.

    `open_share` is the same, of each image the share of its pixels that is left: for want of a sample.
    """

    shrunk: int = 0
    tokens: int | None = 0
    known: int = 0
    open_bytes: int = 0
    open_share: float = 0.0


class Survey:
    """Takes the rows of a plan in, with their images; says what they would take in each resolution."""

    def __init__(self, options: PrepareOptions, *, image_root: str) -> None:
        self._options = options
        self._model = options.fit if options.fit and family_of(options.model) is None else options.model
        self._ways = _ways(options, self._model)
        self._look = lru_cache(maxsize=4096)(self._looks)  # sizes repeat
        self._sums = [_Sum() for _ in self._ways]
        plain = {"fit": None, "max_side": None, "max_pixels": None, "image_format": "keep"}
        self._plain = Converter(options.model_copy(update=plain), image_root=image_root, batch_format=False)
        self._sample: list[_Measured] = []
        self._stride = 1
        self._images = self._candidates = self._sent = 0

    def add(self, row: Row, done: Converted, *, reused: bool) -> None:
        """Take in a row; `reused` says that its request is answered already."""
        wanted: list[tuple[int, int, list[bool]]] = []
        for place, (given, sent) in enumerate(done.images):
            self._images += 1
            self._sent += _in_base64(sent)
            unknown = self._count(given, sent, reused=reused)
            if any(unknown):
                if self._candidates % self._stride == 0:
                    wanted.append((place, self._candidates, unknown))
                self._candidates += 1
        if not wanted:
            return
        pictures = self._plain.pictures(row)
        if len(pictures) == len(done.images):  # else they are seen from other machines alone
            for place, number, unknown in wanted:
                self._measure(pictures[place], number, done.images[place][0], unknown)

    def _count(self, given: Given, sent: int, *, reused: bool) -> list[bool]:
        """Add one image to each sum; return in which of them its bytes are not known."""
        whole = (given.width, given.height)
        looks = self._look(*whole)
        unknown = []
        for total, (size, tokens) in zip(self._sums, looks, strict=True):
            total.shrunk += size != whole
            if not reused and total.tokens is not None:
                total.tokens = total.tokens + tokens if tokens is not None else None
            as_given = size == looks[0][0]
            unknown.append(not as_given and not (given.kept and size == whole))
            if not unknown[-1]:
                total.known += _in_base64(sent if as_given else given.size)
            else:
                total.open_bytes += given.size
                total.open_share += given.size * size[0] * size[1] / (given.width * given.height)
        return unknown

    def _looks(self, width: int, height: int) -> list[tuple[tuple[int, int], int | None]]:
        """The size and the tokens of an image in each way."""
        sizes = [_sized(width, height, way) for way in self._ways.values()]
        return [(size, image_tokens(self._model, *size, self._options.image_detail)) for size in sizes]

    def _measure(self, picture: Picture, number: int, given: Given, unknown: list[bool]) -> None:
        made: list[int | None] = []
        source, span = picture, (given.width, given.height)
        try:
            for way, wanted in zip(self._ways.values(), unknown, strict=True):
                if not wanted:
                    made.append(None)
                    continue
                size = _sized(given.width, given.height, way)
                if way.fit is not None or not _shrinks_to(span, size):
                    source, span = picture, (given.width, given.height)
                # Else from what was made before, which is quicker to read, and takes about the same bytes in the end.
                done = convert(source.data, way, name="")
                made.append(len(done.data))
                if done.pixels == size[0] * size[1]:
                    source, span = done, size
        except RowError:
            return  # broken behind its header: that shows only once it is to be shrunk
        self._sample.append(_Measured(number, given.size, made))
        if len(self._sample) > SAMPLED:
            self._stride *= 2
            self._sample = [one for one in self._sample if one.number % self._stride == 0]

    def resolutions(
        self, *, requests: int, requests_bytes: int, shards: int, tokens: Totals | None
    ) -> list[Resolution]:
        """What is given first, as the plan knows it; nothing where no request has an image.

        `tokens` are those of the requests to send, where somebody bills them.
        """
        found = []
        for index, name in enumerate(self._ways if self._images else ()):
            total = self._sums[index]
            size, sampled = requests_bytes, None
            if index > 0:
                size += total.known - self._sent
            if total.open_bytes:
                share, sampled = self._share(index)
                size += round((total.open_bytes * share if share is not None else total.open_share) * 4 / 3)
            least = max(-(-requests // self._options.shard_requests), -(-size // self._options.shard_bytes))
            resolution = Resolution(
                name=name,
                shrunk=total.shrunk,
                image_tokens=total.tokens,
                requests_bytes=size,
                shards=shards if size == requests_bytes else least,
                usd=self._usd(tokens, total.tokens) if tokens is not None else None,
                sampled=sampled,
            )
            found.append(resolution)
        return found

    def _share(self, index: int) -> tuple[float | None, int]:
        """What is left of the bytes of an image in one way, by the sample, and how many images that goes by."""
        pairs = [(one.given, made) for one in self._sample if (made := one.made[index]) is not None]
        given = sum(before for before, _ in pairs)
        return sum(after for _, after in pairs) / given if given else None, len(pairs)

    def _usd(self, tokens: Totals, image: int | None) -> float | None:
        options = self._options
        totals = replace(tokens, image=image)
        plan = estimate(totals, backend=options.backend, model=options.model, shards=0, host=options.host)
        return plan.batch_usd if plan.output_tokens is not None else plan.input_batch_usd


def _ways(options: PrepareOptions, model: str) -> dict[str, ImageOptions]:
    """By name: as the options say, then each other way that is no repetition."""
    unchanged = ImageOptions(
        media_types=options.limits.media_types,
        format=options.image_format,
        quality=options.image_quality,
        detail=options.image_detail,
    )
    given = replace(unchanged, max_side=options.max_side, max_pixels=options.max_pixels, fit=options.fit)
    ways = {"as given": given, "unchanged": unchanged}
    fit = options.fit or model
    if family_of(fit) is not None:
        ways[f"--fit {fit}"] = replace(unchanged, fit=fit)
    for side in SIDES:
        ways[f"--max-side {side}"] = replace(unchanged, max_side=side)
    return {name: way for name, way in ways.items() if name == "as given" or way != given}


def _sized(width: int, height: int, way: ImageOptions) -> tuple[int, int]:
    return sent_size(width, height, max_side=way.max_side, max_pixels=way.max_pixels, fit=way.fit, detail=way.detail)


def _shrinks_to(larger: tuple[int, int], smaller: tuple[int, int]) -> bool:
    """Whether both sides shrink, by the same factor but for the rounding."""
    across, down = (before / after for before, after in zip(larger, smaller, strict=True))
    return min(across, down) >= 1 and max(across, down) < 1.01 * min(across, down)


def _in_base64(size: int) -> int:
    return -(-size // 3) * 4
