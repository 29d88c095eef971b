"""An image reference → checked, possibly changed bytes.

Formats that the target takes pass through byte for byte unless an option asks for change. The checks are cheap: the
type by the first bytes, the size from the header, the end by the format's end marker. Only what is re-encoded is
decoded.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

import pybase64

from batchkit import headers, ownership, resizing
from batchkit.errors import RowError
from batchkit.references import shown
from batchkit.sizes import bounded, sent_size

if TYPE_CHECKING:
    from PIL import Image

PIXEL_LIMIT = 178_956_970
"""Images of more pixels are rejected as decompression bombs: where Pillow itself raises (2 × its MAX_IMAGE_PIXELS)."""

FILE_LIMIT = 1 << 30
"""Larger files (in bytes) are rejected unread: no image of so few pixels needs that, and it would fill the memory."""

ImageFormat = Literal["keep", "jpeg", "png", "webp"]

MEDIA_TYPES = {"JPEG": "image/jpeg", "MPO": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}
PROGRAMS = frozenset({"EPS"})
"""Pillow would have Ghostscript run them."""

ORIENTATION = 0x0112
SIDEWAYS = range(5, 9)
"""EXIF 2.32, tag Orientation: the values that swap width and height."""

DRAFT_MARGIN = 1.4
"""A JPEG is decoded to a fraction that is so many times larger than what is wanted, at least: nearer to it the result
differs visibly from that of a full decoding (SSIM of photographs below 0.98)."""

JPEG_END = b"\xff\xd9"
PNG_END = b"IEND\xaeB`\x82"


@dataclass(frozen=True)
class ImageOptions:
    """`max_side` in pixels, `max_pixels` in pixels of area; both only shrink. `quality` is JPEG's and WebP's, 1 to 100.

    `media_types` is what the target takes; anything else is re-encoded. `fit` is a model that `grids` knows: images
    are brought to its own size for them, asked for with `detail`, unless that takes more bytes.
    """

    media_types: frozenset[str]
    max_side: int | None = None
    max_pixels: int | None = None
    format: ImageFormat = "keep"
    quality: int = 90
    fit: str | None = None
    detail: str | None = None


class Given(NamedTuple):
    """An image before anything was changed; `kept` says that it could be sent as it is, but for its size."""

    width: int
    height: int
    size: int
    kept: bool


class Picture(NamedTuple):
    """`data` are the encoded bytes of type `media_type`; `pixels` is width × height as sent."""

    media_type: str
    data: bytes
    pixels: int
    given: Given | None = None


def load(reference: str | bytes, root: Path, options: ImageOptions, *, name: str = "(bytes)") -> Picture:
    """Read, check and where needed change one image.

    `reference` is a path (relative to `root`), a `file://` URI or a `data:` URL, or the encoded bytes themselves, which
    messages call `name`. Raises `RowError` with code `image`, and a message that names the reference.
    """
    if isinstance(reference, bytes):
        return convert(reference, options, name=name)
    inline = reference.startswith("data:")
    data = _from_data_url(reference) if inline else read(find(reference, str(root))[0], reference)
    return convert(data, options, name=reference)


def convert(data: bytes, options: ImageOptions, *, name: str) -> Picture:
    """The bytes of one image, checked and changed as `options` ask. `name` is for messages; they show it shortened."""
    if not data:
        raise RowError("image", f"image is empty: {shown(name)}")
    header = headers.read(data)
    if header is not None and _passes(header, options) and not is_truncated(data, header.kind):
        given = Given(header.width, header.height, len(data), kept=True)
        return Picture(MEDIA_TYPES[header.kind], data, header.width * header.height, given)
    return _opened(data, options, shown(name))


def _passes(header: headers.Header, options: ImageOptions) -> bool:
    """Whether an image is sent as it is, if its end is there."""
    size = header.width, header.height
    return (
        options.fit is None  # which wants to know how the image lies
        and MEDIA_TYPES[header.kind] in options.media_types
        and options.format in ("keep", header.kind.lower())
        and header.width * header.height <= PIXEL_LIMIT
        and bounded(*size, options.max_side, options.max_pixels) == size
    )


def _opened(data: bytes, options: ImageOptions, name: str) -> Picture:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Pillow warns at half of its limit; ours is the limit itself, checked below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                return _convert(image, data, options, name)
    except Image.DecompressionBombError as exc:
        raise RowError("image", f"image has more than {PIXEL_LIMIT:,} pixels: {name}") from exc
    except UnidentifiedImageError as exc:
        raise RowError("image", f"not an image that can be read: {name} {_beginning(data)}") from exc
    except RowError:
        raise
    except Exception as exc:  # hostile files make decoders raise anything; one row is no reason to stop
        raise RowError("image", f"image is broken: {name}: {exc}") from exc


def _convert(image: Image.Image, data: bytes, options: ImageOptions, name: str) -> Picture:
    width, height = image.size
    if width * height > PIXEL_LIMIT:
        raise RowError("image", f"image has {width} × {height} pixels, more than {PIXEL_LIMIT:,}: {name}")
    kind = image.format or ""
    if kind in PROGRAMS:
        raise RowError("image", f"{kind} is a program, not an image that is read: {name}")
    if is_truncated(data, kind):
        raise RowError("image", f"image is cut off (its end is missing): {name}")
    media_type = MEDIA_TYPES.get(kind, "")
    size = _size(image, options)
    target = f"image/{options.format}" if options.format != "keep" else media_type
    if target not in options.media_types:
        target = "image/png"
    given = Given(width, height, len(data), target == media_type)
    unchanged = Picture(media_type, data, width * height, given)
    if size == (width, height) and given.kept:
        return unchanged
    if target == "image/gif":
        target = "image/png"  # a resized GIF would lose more to its palette
    made = _encode(image, size, target, options.quality)
    asked = bounded(width, height, options.max_side, options.max_pixels)
    if given.kept and asked == (width, height) and len(made.data) >= len(data):
        return unchanged  # the model resizes it anyway: not at the price of more bytes
    return made._replace(given=given)


def _encode(image: Image.Image, size: tuple[int, int], media_type: str, quality: int) -> Picture:
    from PIL import Image, ImageOps

    ownership.keep_memory()
    whole = image.size
    orientation = image.getexif().get(ORIENTATION, 1)
    if size != image.size:
        # JPEG decodes straight to 1/2, 1/4 or 1/8 of its size; only a no-op for other formats.
        image.draft(None, (int(size[0] * DRAFT_MARGIN), int(size[1] * DRAFT_MARGIN)))
    # What was decoded to a fraction has been filtered once: there Pillow's narrower filter is as good, in less time.
    kernel = Image.Resampling.LANCZOS if image.size == whole else Image.Resampling.BICUBIC
    upright = ImageOps.exif_transpose(image) if orientation != 1 else image
    if orientation in SIDEWAYS:
        size = (size[1], size[0])
    drawn = _in_mode(upright, alpha=media_type != "image/jpeg")
    if drawn.size != size:
        drawn = resizing.resize(drawn, size, kernel)
    out = io.BytesIO()
    if media_type == "image/png":
        drawn.save(out, "PNG")
    else:
        drawn.save(out, media_type.removeprefix("image/").upper(), quality=quality)
    return Picture(media_type, out.getvalue(), size[0] * size[1])


def _in_mode(image: Image.Image, *, alpha: bool) -> Image.Image:
    """`image` as grey, RGB, or (where `alpha` may be kept) RGBA; without alpha, on white."""
    from PIL import Image

    if image.mode in ("L", "RGB"):
        return image
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if alpha:
            return rgba
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _stretched(image)
    return image.convert("L" if image.mode == "1" else "RGB")


def _stretched(image: Image.Image) -> Image.Image:
    """16-bit and float images as 8-bit grey, from darkest to brightest: a plain conversion would clip at 255."""
    grey = image.convert("F")
    low, high = (float(edge) for edge in grey.getextrema())  # type: ignore[arg-type]  # one band: two numbers
    scale = 255.0 / (high - low) if high > low else 0.0
    return grey.point(lambda value: value * scale - low * scale).convert("L")


def _size(image: Image.Image, options: ImageOptions) -> tuple[int, int]:
    """The size to send, as the image lies in its file: models see what lies on its side upright."""
    sideways = options.fit is not None and image.getexif().get(ORIENTATION, 1) in SIDEWAYS
    width, height = image.size[::-1] if sideways else image.size
    size = sent_size(
        width,
        height,
        max_side=options.max_side,
        max_pixels=options.max_pixels,
        fit=options.fit,
        detail=options.detail,
    )
    return size[::-1] if sideways else size


def is_truncated(data: bytes, kind: str) -> bool:
    """Whether the end marker of the format (Pillow's name for it) is missing.

    Formats: JPEG ITU-T T.81 B.1.1.3 (EOI), PNG (W3C, IEND), GIF89a (trailer 0x3B), WebP (RIFF container size).
    Bytes behind the end are common and harmless.
    """
    if kind in ("JPEG", "MPO"):
        # A thumbnail in the header has an end marker of its own: look behind the start of the scan.
        return not data.endswith(JPEG_END) and data.rfind(JPEG_END) < _jpeg_scan(data)
    if kind == "PNG":
        return PNG_END not in data[-4096:] and PNG_END not in data
    if kind == "GIF":
        return not data.rstrip(b"\x00").endswith(b";")
    if kind == "WEBP":
        return len(data) < int.from_bytes(data[4:8], "little") + 8
    return False


def _jpeg_scan(data: bytes) -> int:
    """Offset of the first start-of-scan marker, or the end where there is none."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xDA:
            return at
        if marker == 0xFF or 0xD0 <= marker <= 0xD8 or marker == 0x01:  # fill, or no length follows
            at += 1 if marker == 0xFF else 2
            continue
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return len(data)


def find(reference: str, root: str) -> tuple[str, os.stat_result]:
    """Where the file of an image is, and what it is now. Raises `RowError` where it is none that is read."""
    if "://" in reference and not reference.startswith("file://"):
        raise RowError("image", f"image is not local, and was not fetched: {shown(reference)}")
    try:
        # Not by way of Path, which takes as long as all the rest of an image that passes through.
        path = unquote(urlsplit(reference).path) if reference.startswith("file://") else os.path.join(root, reference)  # noqa: PTH118
        found = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError) as exc:
        raise _unreadable(exc, reference) from exc
    if not stat.S_ISREG(found.st_mode):  # a pipe or a device could be read for ever
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "not a regular file"
        raise RowError("image", f"image is {kind}: {shown(reference)}")
    if found.st_size > FILE_LIMIT:
        raise RowError("image", f"image file has {found.st_size:,} bytes, more than {FILE_LIMIT:,}: {shown(reference)}")
    return path, found


def read(path: str, reference: str) -> bytes:
    """The bytes of a file that `find` has found. Raises `RowError`."""
    try:
        with open(path, "rb", buffering=0) as stream:
            return stream.readall()
    except (OSError, ValueError) as exc:
        raise _unreadable(exc, reference) from exc


def _unreadable(exc: OSError | ValueError, reference: str) -> RowError:
    """What the system says of a file, as a fault of the row."""
    if isinstance(exc, FileNotFoundError):
        return RowError("image", f"image not found: {shown(reference)}")
    why = exc.strerror if isinstance(exc, OSError) else exc
    return RowError("image", f"image cannot be read: {shown(reference)}: {why}")


def _from_data_url(url: str) -> bytes:
    head, comma, text = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise RowError("image", f"data URL is not base64: {shown(url)}")
    try:
        return pybase64.b64decode(text, validate=True)
    except ValueError as exc:
        raise RowError("image", f"data URL is not valid base64: {shown(url)}") from exc


def _beginning(data: bytes) -> str:
    if data.lstrip()[:1] == b"<":
        return "(it begins like HTML or XML)"
    return f"(it begins with {data[:8].hex(' ')})"
