"""Images in another size: by OpenCV where it is installed, which takes a third of the time that Pillow takes.

Only the pixels go through it. Pillow alone decodes and encodes: what it rejects is rejected with both.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from batchkit.ownership import is_ours

if TYPE_CHECKING:
    from PIL import Image

LEAST, MOST = 0.9, 3.0
"""How many pixels may become one (in each direction) where OpenCV does it: with more, Pillow averages them first."""

LOBES = 3
"""Of the Lanczos filter."""
CUBIC = -0.75
"""The `a` of OpenCV's cubic interpolation (imgproc/src/resize.cpp, interpolateCubic)."""
STEPS = 32
"""The filters are compared at so many places a pixel."""

_BLAS_THREADS = "OPENBLAS_NUM_THREADS"


def resize(image: Image.Image, size: tuple[int, int], kernel: Image.Resampling) -> Image.Image:
    """`image` in `size`. `kernel` is Pillow's; OpenCV's result is nearly that of Lanczos."""
    factors = image.width / size[0], image.height / size[1]
    suits = image.mode in ("L", "RGB") and all(LEAST <= one <= MOST for one in factors)
    cv2 = _opencv(ours=is_ours()) if suits else None
    if cv2 is None:
        return image.resize(size, kernel, reducing_gap=2.0)
    import numpy as np
    from PIL import Image

    across, down = (_prefilter(round(max(one, 1.0), 2)) for one in factors)
    smooth = cv2.sepFilter2D(np.asarray(image), -1, across, down, borderType=cv2.BORDER_REPLICATE)
    made = Image.fromarray(cv2.resize(smooth, size, interpolation=cv2.INTER_CUBIC))
    made.info = image.info.copy()  # as Pillow's own: comments and colour profiles are written from there
    return made


def libraries() -> str:
    """What images are changed with, for the manifest: other libraries make other bytes of the same image."""
    import PIL

    cv2 = _opencv(ours=is_ours())
    return f"Pillow {PIL.__version__}" + (f", OpenCV {cv2.__version__}" if cv2 is not None else "")


@functools.cache
def _opencv(*, ours: bool) -> Any:
    """The module `cv2`; None where it is not there, does not load (for want of libGL, say), or is half removed. In a
    process that is `ours` it has no threads, even where that was forked off another's, which has loaded it."""
    try:
        with _without_threads() if ours else contextlib.nullcontext():
            import cv2

            if ours:
                cv2.setNumThreads(1)  # processes divide the work
            found: Any = (cv2, cv2.sepFilter2D, cv2.resize, cv2.__version__)[0]
    except Exception:  # noqa: BLE001  # whatever is wrong with it: Pillow does it, too
        return None
    return found


@contextlib.contextmanager
def _without_threads() -> Iterator[None]:
    """OpenBLAS, which NumPy and OpenCV bring along, starts a thread a core when it is loaded, but none in the block."""
    if _BLAS_THREADS in os.environ:
        yield
        return
    os.environ[_BLAS_THREADS] = "1"
    try:
        yield
    finally:
        del os.environ[_BLAS_THREADS]  # engines that are started later have threads


@functools.lru_cache(512)
def _prefilter(factor: float) -> Any:
    """What makes OpenCV's cubic interpolation, which looks at four pixels however far apart the new ones are, a Lanczos
    filter that is `factor` times as wide: the symmetrical filter before it that brings both together nearest to that,
    by least squares. Its sum is 1.
    """
    import numpy as np

    reach = round(1.5 * factor)
    edge = max(LOBES * factor, reach + 2)
    at = np.arange(-edge, edge, 1 / STEPS)
    wanted = np.where(abs(at) < LOBES * factor, np.sinc(at / factor) * np.sinc(at / factor / LOBES), 0.0)
    wanted *= STEPS / wanted.sum()
    middle = _cubic(at)
    pairs = [_cubic(at - tap) + _cubic(at + tap) - 2 * middle for tap in range(1, reach + 1)]
    taps = np.linalg.lstsq(np.stack(pairs, 1), wanted - middle, rcond=None)[0]
    return np.concatenate([taps[::-1], [1 - 2 * taps.sum()], taps]).astype(np.float32)


def _cubic(at: Any) -> Any:
    """The kernel of cubic interpolation (Keys 1981)."""
    import numpy as np

    far = abs(at)
    near_part = (CUBIC + 2) * far**3 - (CUBIC + 3) * far**2 + 1
    far_part = CUBIC * (far**3 - 5 * far**2 + 8 * far - 4)
    return np.where(far < 1, near_part, np.where(far < 2, far_part, 0.0))
