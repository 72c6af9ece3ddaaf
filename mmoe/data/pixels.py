"""From an encoded image to pixels, with numpy and Pillow alone: the definition that every decoder has to meet.

The training pipeline (DALI) and the exported Hugging Face processor agree because both follow this file: whatever is
not a plain 8-bit RGB or gray picture goes through :func:`canonical` first, and plain pictures decode to the same pixels
everywhere. An exported model ships this file as it is.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM")
"""What is decoded; everything else (GIF, AVIF, …) is a bad image."""
MEAN, SCALE = 127.5, 63.75
"""Normalised = (x − 127.5) / 63.75 = (x/255 − 0.5)·4, for x in [0, 255]."""
MAX_PIXELS = 64_000_000
MAX_SCANS = 32
"""Of a progressive JPEG, which encoders give ten or so. Each is a pass over all pixels for as little as 30 bytes."""
MAX_SEGMENTS = 1 << 16
"""Of a JPEG, up to its end: each of them costs a step here. An ICC profile or a long EXIF has some hundred."""

Fit = Literal["stretch", "pad", "crop"]
Interpolation = Literal["triangular", "cubic"]
SUPPORT: dict[Interpolation, int] = {"triangular": 1, "cubic": 2}
"""Half of a filter's width, in pixels of the coarser grid."""
_FILTERS = {"triangular": Image.Resampling.BILINEAR, "cubic": Image.Resampling.BICUBIC}

_MAGIC: dict[str, Callable[[bytes], bool]] = {
    "GIF": lambda d: d[:4] == b"GIF8",
    "AVIF": lambda d: d[4:12] in (b"ftypavif", b"ftypavis"),
    "HEIF": lambda d: d[4:11] in (b"ftyphei", b"ftypmif"),
    "JPEG 2000": lambda d: d[4:8] == b"jP  " or d[:4] == b"\xff\x4f\xff\x51",
    "JPEG XL": lambda d: d[:2] == b"\xff\x0a" or d[4:8] == b"JXL ",
}
_ORIENTATION = 0x0112
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
"""Of a JPEG's segment or of its end; stuffed bytes, restarts and filling are none."""
_SCAN, _END = 0xDA, 0xD9
_PNG_END = b"IEND\xaeB`\x82"


class BadImage(ValueError):
    """An image that cannot be used; the message says why."""


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads the header alone.

    Raises:
        BadImage: it is empty, of an unsupported format, broken, or announces more than ``max_pixels`` pixels,
            has more than :data:`MAX_SCANS` scans, or is a PNG that was cut.
    """
    if not data:
        raise BadImage("empty image")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(f"too many pixels: {error}") from None
    except Image.UnidentifiedImageError:
        name = next((name for name, matches in _MAGIC.items() if matches(data[:16])), None)
        raise BadImage(f"unsupported format {name}" if name else "not an image of a supported format") from None
    except Exception as error:  # Pillow's parsers raise nearly anything on hostile bytes
        raise BadImage(f"unreadable header: {error}") from None
    width, height = image.size
    if width * height > max_pixels:
        raise BadImage(f"{width}x{height} is more than {max_pixels} pixels")
    scans = _scans(data) if image.format in ("JPEG", "MPO") else 0
    if scans > MAX_SCANS:
        raise BadImage(f"a JPEG of {scans} scans is more than {MAX_SCANS}")
    # Pillow would take it as whole; others do not.
    if image.format == "PNG" and _PNG_END not in data:
        raise BadImage("corrupt image: a PNG without its end")
    return image


def _scans(data: bytes) -> int:
    """Scans of a JPEG, as a decoder meets them: segments are passed over by their length, and what follows the end (a
    phone's film, further pictures) is not looked at."""
    found = at = 0
    for _ in range(MAX_SEGMENTS):
        marker = _MARKER.search(data, at)
        if marker is None or data[marker.start() + 1] == _END:
            return found
        found += data[marker.start() + 1] == _SCAN
        at = marker.end() + max(2, int.from_bytes(data[marker.end() : marker.end() + 2]))
    raise BadImage(f"a JPEG of more than {MAX_SEGMENTS} segments")


def _orientation(image: Image.Image) -> int:
    if not image.info.keys() & {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"} and image.format != "TIFF":
        return 1
    return image.getexif().get(_ORIENTATION, 1)


def is_plain(image: Image.Image, data: bytes) -> bool:
    """Whether the picture is 8-bit RGB or gray, upright and opaque, so that any decoder gives the same pixels."""
    if image.format == "JPEG":
        return image.mode in ("RGB", "L") and _orientation(image) not in range(2, 9)
    if image.format == "PNG":
        depth, colour = data[24], data[25]
        return (
            depth == 8
            and colour in (0, 2)
            and "transparency" not in image.info
            and not getattr(image, "is_animated", False)
            and b"eXIf" not in data
            and _orientation(image) not in range(2, 9)
        )
    return False


def to_rgb(image: Image.Image) -> Image.Image:
    """The upright 8-bit RGB picture: the first frame, EXIF orientation applied, 16 bits cut to their high byte, alpha
    laid over white, gray, palette and CMYK converted.

    Raises:
        BadImage: the pixels cannot be decoded, or have no defined conversion.
    """
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            high = np.asarray(image).astype(np.uint16) >> 8
            return Image.fromarray(high.astype(np.uint8)).convert("RGB")
        if image.mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr"):
            raise BadImage(f"pixels of mode {image.mode}")
        if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
            rgba = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return image.convert("RGB")
    except BadImage:
        raise
    except Exception as error:  # as in open_image
        raise BadImage(f"corrupt image: {error}") from None


def canonical(image: Image.Image, data: bytes) -> tuple[bytes, tuple[int, int]]:
    """The same picture in a form that every decoder reads alike: ``data`` itself where it is plain, else an
    uncompressed RGB PNG of :func:`to_rgb`; and its height and width, upright.

    Args:
        image: ``data``, opened.

    Raises:
        BadImage: see :func:`to_rgb`. A plain picture's pixels are not looked at.
    """
    if is_plain(image, data):
        return data, (image.height, image.width)
    out, rgb = io.BytesIO(), to_rgb(image)
    rgb.save(out, "PNG", compress_level=0)
    return out.getvalue(), (rgb.height, rgb.width)


class Frame(NamedTuple):
    """How a picture comes into a square: laid in the middle of ``canvas``, which is resized to ``resized``, in the
    middle of which the square lies; each as height, width. Where a middle falls between two pixels it is the upper
    left one."""

    canvas: tuple[int, int]
    resized: tuple[int, int]


def frame(height: int, width: int, size: int, fit: Fit) -> Frame:
    """Of a picture of ``height`` × ``width`` in a square of ``size``.

    - stretch: both sides to ``size``.
    - pad: a gray border makes it a square first (LLaVA-1.5, arXiv 2310.03744; Cambrian-1, arXiv 2406.16860).
    - crop: the shorter side to ``size``, the longer one in proportion, cut to whole pixels (CLIP, arXiv 2103.00020).
    """
    square, whole = (size, size), (height, width)
    if fit == "stretch":
        return Frame(whole, square)
    if fit == "pad":
        return Frame((max(whole), max(whole)), square)
    if height <= width:
        return Frame(whole, (size, size * width // height))
    return Frame(whole, (size * height // width, size))


def window(framed: Frame, size: int) -> tuple[float, float, float, float]:
    """The part of the canvas that the square shows: top, left, bottom, right."""
    (height, width), (rows, columns) = framed
    top, left = (rows - size) // 2, (columns - size) // 2
    y, x = height / rows, width / columns
    return top * y, left * x, (top + size) * y, (left + size) * x


def check_frame(framed: Frame, max_pixels: int) -> None:
    """Raises :class:`BadImage` where the canvas has more than ``max_pixels`` pixels: a long strip, padded."""
    height, width = framed.canvas
    if height * width > max_pixels:
        raise BadImage(f"padded to {width}x{height} it has more than {max_pixels} pixels")


def resize(
    pixels: NDArray[np.float32],
    size: int,
    box: tuple[float, float, float, float] | None = None,
    interpolation: Interpolation = "triangular",
) -> NDArray[np.float32]:
    """``box`` (:func:`window`; all, where it is None) of ``[height, width]`` → ``[size, size]``.

    The filter, a triangle or Catmull and Rom's cubic (a = −1/2), is widened where it shrinks (antialiased); beyond the
    border the edge pixel goes on, as in DALI (Pillow alone would renormalise the filter there). The cubic overshoots:
    what leaves [0, 255] is cut.
    """
    height, width = pixels.shape
    top, left, bottom, right = box or (0, 0, height, width)
    if (height, width) == (size, size) == (bottom - top, right - left):
        return pixels
    (rows, above), (columns, before) = (
        _reached(start, end, length, size, SUPPORT[interpolation])
        for start, end, length in ((top, bottom, height), (left, right, width))
    )
    padded = Image.fromarray(np.pad(pixels[rows.there, columns.there], (rows.beyond, columns.beyond), mode="edge"))
    shifted = (left - before, top - above, right - before, bottom - above)
    out = np.asarray(padded.resize((size, size), _FILTERS[interpolation], box=shifted))
    return out.clip(0, 255) if interpolation == "cubic" else out


class _Reach(NamedTuple):
    there: slice
    beyond: tuple[int, int]


def _reached(start: float, end: float, length: int, size: int, support: int) -> tuple[_Reach, int]:
    """What the filters of ``size`` pixels over [start, end) reach: pixels, how many beyond either border, the first."""
    margin = support * max(1, math.ceil((end - start) / size)) + 1
    low, high = math.floor(start) - margin, math.ceil(end) + margin
    return _Reach(slice(max(0, low), min(length, high)), (max(0, -low), max(0, high - length))), low


def normalised(
    rgb: Image.Image, size: int, fit: Fit = "stretch", interpolation: Interpolation = "triangular"
) -> NDArray[np.float32]:
    """A picture of :func:`to_rgb` → the float32 ``[3, size, size]`` that the model reads."""
    framed = frame(rgb.height, rgb.width, size, fit)
    channels = np.asarray(rgb, dtype=np.float32).transpose(2, 0, 1)
    rows, columns = (outer - inner for outer, inner in zip(framed.canvas, channels.shape[1:], strict=True))
    if rows or columns:
        border = (0, 0), (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2)
        channels = np.pad(channels, border, constant_values=MEAN)
    box = window(framed, size)
    pixels = np.stack([resize(channel, size, box, interpolation) for channel in channels])
    return (pixels - np.float32(MEAN)) * np.float32(1 / SCALE)


def preprocess(
    image: bytes | Image.Image,
    image_sizes: Sequence[int],
    fit: Fit = "stretch",
    interpolation: Interpolation = "triangular",
    max_pixels: int = MAX_PIXELS,
) -> tuple[dict[int, NDArray[np.float32]], tuple[int, int]]:
    """An encoded or opened image → the normalised ``[3, side, side]`` float32 for each side of ``image_sizes``, and the
    upright picture's height and width.

    Raises:
        BadImage: see :func:`open_image`, :func:`to_rgb` and :func:`check_frame`.
    """
    rgb = to_rgb(open_image(image, max_pixels) if isinstance(image, bytes) else image)
    for size in image_sizes:
        check_frame(frame(rgb.height, rgb.width, size, fit), max_pixels)
    return {size: normalised(rgb, size, fit, interpolation) for size in image_sizes}, (rgb.height, rgb.width)
