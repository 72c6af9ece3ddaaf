"""Pictures for the tests, good, odd and bad."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def encode(pixels: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    """uint8 pixels ``[height, width]`` or ``[height, width, channels]`` as a file of that format."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form, **options)
    return out.getvalue()


def picture(seed: int, height: int = 16, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(seed: int, height: int, width: int) -> np.ndarray:
    """A picture without the noise that JPEG and resizing would lose."""
    small = Image.fromarray(picture(seed, height // 8 + 2, width // 8 + 2))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG by hand, for what Pillow does not write; every row begins with its filter byte."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def save(image: Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def bad_images() -> dict[str, tuple[bytes, str]]:
    whole = encode(picture(11, 64, 64))
    return {
        "empty": (b"", "empty"),
        "html": (b"<html>not found</html>" * 10, "supported format"),
        "gif": (encode(picture(0)[..., 0], "GIF"), "GIF"),
        "avif": (b"\0\0\0\x20ftypavif\0\0\0\0avifmif1", "AVIF"),
        "giant": (png(60000, 60000, 8, 2, b""), "pixels"),
        "above the bound": (png(9000, 9000, 8, 2, b""), "pixels"),
        "header cut": (whole[:20], "supported format|header"),
        "float pixels": (save(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "mode F"),
        "cut": (whole[: len(whole) // 2], "corrupt"),
    }
