"""The size that an image is sent in: what was asked for, and what a model makes of it. Pure arithmetic."""

from __future__ import annotations

from batchkit.grids import family_of, fitted_size


def sent_size(
    width: int,
    height: int,
    *,
    max_side: int | None = None,
    max_pixels: int | None = None,
    fit: str | None = None,
    detail: str | None = None,
) -> tuple[int, int]:
    """Never more on either side than `width` and `height`.

    `fit` is the name of a model that is known (`grids`), to whose own size the image is brought once it is no larger
    than `max_side` and `max_pixels` allow. The latter takes the place of the model's own limit on the area, where it
    has one: then the model, told the same limit, makes the same grid of it.
    """
    plain = bounded(width, height, max_side, max_pixels)
    if fit is None:
        return plain
    family = family_of(fit)
    has_area = family is not None and family.has_area
    within = bounded(width, height, max_side, None) if has_area else plain
    across, down = fitted_size(fit, *within, detail, max_pixels)
    return plain if max_pixels and across * down > max_pixels else (across, down)


def bounded(width: int, height: int, max_side: int | None, max_pixels: int | None) -> tuple[int, int]:
    """Scaled down, the ratio kept, until the longer side and the area are within their limits."""
    factor = 1.0
    if max_side:
        factor = min(factor, max_side / max(width, height))
    if max_pixels:
        factor = min(factor, (max_pixels / (width * height)) ** 0.5)
    if factor >= 1.0:
        return width, height
    rounding = int if max_pixels else round
    return max(1, int(rounding(width * factor))), max(1, int(rounding(height * factor)))
