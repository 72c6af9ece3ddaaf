"""From an encoded image to pixels, with numpy and Pillow alone: the definition that every decoder has to meet.

The training pipeline (DALI) and the exported Hugging Face processor agree because both follow this file: whatever is
not a plain 8-bit RGB or gray picture goes through :func:`canonical` first, and plain pictures decode to the same pixels
everywhere. An exported model ships this file as it is.
"""

import io
import re
from collections.abc import Callable

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


class BadImage(ValueError):
    """An image that cannot be used; the message says why."""


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads the header alone.

    Raises:
        BadImage: it is empty, of an unsupported format, broken, or announces more than ``max_pixels`` pixels,
            or has more than :data:`MAX_SCANS` scans.
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


def canonical(image: Image.Image, data: bytes) -> bytes:
    """The same picture in a form that every decoder reads alike: ``data`` itself where it is plain, else an
    uncompressed RGB PNG of :func:`to_rgb`.

    Args:
        image: ``data``, opened.

    Raises:
        BadImage: see :func:`to_rgb`. A plain picture's pixels are not looked at.
    """
    if is_plain(image, data):
        return data
    out = io.BytesIO()
    to_rgb(image).save(out, "PNG", compress_level=0)
    return out.getvalue()


def resize(pixels: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """``[height, width]`` → ``[size, size]`` with a triangular filter, widened where it shrinks (antialiased); beyond
    the border the edge pixel goes on, as in DALI (Pillow alone would renormalise the filter there)."""
    height, width = pixels.shape
    if (height, width) == (size, size):
        return pixels
    y, x = -(-height // size) + 1, -(-width // size) + 1
    padded = Image.fromarray(np.pad(pixels, ((y, y), (x, x)), mode="edge"))
    box = (x, y, x + width, y + height)
    return np.asarray(padded.resize((size, size), Image.Resampling.BILINEAR, box=box))


def preprocess(image: bytes | Image.Image, image_size: int, max_pixels: int = MAX_PIXELS) -> NDArray[np.float32]:
    """An encoded or opened image → the normalised ``[3, image_size, image_size]`` float32 that the model reads.

    Raises:
        BadImage: see :func:`open_image` and :func:`to_rgb`.
    """
    rgb = to_rgb(open_image(image, max_pixels) if isinstance(image, bytes) else image)
    channels = np.asarray(rgb, dtype=np.float32).transpose(2, 0, 1)
    pixels = np.stack([resize(channel, image_size) for channel in channels])
    return (pixels - np.float32(MEAN)) * np.float32(1 / SCALE)
