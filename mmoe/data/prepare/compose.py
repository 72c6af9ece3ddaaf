"""Pictures of scenes: backgrounds, stamps scaled to sprites, alpha composition, placement without overlap."""

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mmoe.data.prepare.catalogue import Catalogue

SCALES = (12, 14, 16, 18, 20, 22, 24, 28, 32, 36, 40)
"""Sizes of a sprite in 64ths of the picture's side: the square root of its box's area."""
LONGEST = 1.6
"""A sprite's longest side is at most this many times its size: thin stamps come out smaller in area."""
TOUCH = 0.9
"""Two boxes may come this close: share of the mean of their sides between their centres, on one axis."""


@dataclass(frozen=True)
class Sprite:
    """A stamp cut to its alpha box, in every size of :data:`SCALES`: premultiplied RGBA, uint8 [h, w, 4]."""

    stamp: str
    label: str
    pixels: dict[int, np.ndarray]


@dataclass(frozen=True)
class Placed:
    """A sprite in a picture; ``box`` is left, top, width, height in pixels."""

    label: str
    stamp: str
    box: tuple[int, int, int, int]

    @property
    def x(self) -> float:
        return self.box[0] + self.box[2] / 2

    @property
    def y(self) -> float:
        return self.box[1] + self.box[3] / 2


def cut(image: Image.Image) -> Image.Image:
    """The part of a picture inside its alpha box, as RGBA."""
    image = image.convert("RGBA")
    return image.crop(image.getchannel("A").getbbox())


def make_sprite(path: Path, stamp: str, label: str, side: int) -> Sprite:
    """Load a stamp for pictures of ``side`` pixels."""
    with Image.open(path) as image:
        # Scaled premultiplied, or the colour of transparent pixels bleeds into the rim.
        whole = cut(image).convert("RGBa")
    pixels = {}
    for scale in SCALES:
        size = scale * side / 64
        factor = min(size / (whole.width * whole.height) ** 0.5, LONGEST * size / max(whole.size))
        width, height = (min(side, max(1, round(length * factor))) for length in whole.size)
        pixels[scale] = np.asarray(
            whole.resize((width, height), Image.Resampling.BOX if factor < 1 else Image.Resampling.BILINEAR)
        )
    return Sprite(stamp, label, pixels)


def load_sprites(catalogue: Catalogue, *, held_out: bool, side: int) -> dict[str, list[Sprite]]:
    """Sprites of one side of the split, by class, for pictures of ``side`` pixels."""
    return {
        label: [
            make_sprite(catalogue.root / stamp.path, stamp.path, label, side)
            for stamp in catalogue.members(label, held_out=held_out)
        ]
        for label in catalogue.plurals
    }


def colour(rng: random.Random, low: float = 30, high: float = 225) -> np.ndarray:
    return np.array([rng.uniform(low, high) for _ in range(3)], np.float32)


def background(rng: random.Random, side: int) -> np.ndarray:
    """A plain, graded or cloudy background, float32 [side, side, 3] in 0..255."""
    style = rng.choice(("plain", "gradient", "clouds"))
    if style == "plain":
        return np.broadcast_to(colour(rng), (side, side, 3)).copy()
    if style == "gradient":
        ramp = np.linspace(0, 1, side, dtype=np.float32)[:, None, None]
        picture = colour(rng) * (1 - ramp) + colour(rng) * ramp
        picture = np.broadcast_to(picture, (side, side, 3)).copy()
        return picture if rng.random() < 0.5 else picture.swapaxes(0, 1).copy()
    noise = np.frombuffer(rng.randbytes(5 * 5 * 3), np.uint8).reshape(5, 5, 3)
    coarse = Image.fromarray((colour(rng) * 0.6 + noise * 0.4).astype(np.uint8))
    return np.array(coarse.resize((side, side), Image.Resampling.BICUBIC), np.float32)


def landscape(rng: random.Random, side: int, horizon: float) -> np.ndarray:
    """A bright sky over ground that brightens towards the viewer; ``horizon`` as a share of the height."""
    rows = np.linspace(0, 1, side, dtype=np.float32)[:, None, None]
    ground = colour(rng, 25, 180) * (0.6 + 0.4 * rows)
    return np.broadcast_to(np.where(rows > horizon, ground, colour(rng, 128, 255)), (side, side, 3)).copy()


def paste(rng: random.Random, picture: np.ndarray, sprite: Sprite, scale: int, x: float, y: float) -> Placed:
    """Compose a sprite, mirrored and brightened at random, around (x, y), moved to lie inside the picture."""
    pixels = sprite.pixels[scale]
    height, width = pixels.shape[:2]
    side = picture.shape[0]
    left = min(max(0, round(x - width / 2)), side - width)
    top = min(max(0, round(y - height / 2)), side - height)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    source = pixels.astype(np.float32)
    target = picture[top : top + height, left : left + width]
    target *= 1 - source[..., 3:] / 255
    target += source[..., :3] * rng.uniform(0.8, 1.15)
    return Placed(sprite.label, sprite.stamp, (left, top, width, height))


def arrange(rng: random.Random, shapes: Sequence[tuple[int, int]], side: int) -> list[tuple[float, float]] | None:
    """Centres for boxes of (width, height) that do not cover each other; None if no place was found."""
    centres: list[tuple[float, float]] = []
    for number, (width, height) in enumerate(shapes):
        for _ in range(40):
            x, y = rng.uniform(width / 2, side - width / 2), rng.uniform(height / 2, side - height / 2)
            if all(
                abs(x - u) > TOUCH * (width + w) / 2 or abs(y - v) > TOUCH * (height + h) / 2
                for (u, v), (w, h) in zip(centres, shapes[:number], strict=True)
            ):
                centres.append((x, y))
                break
        else:
            return None
    return centres


def scatter(rng: random.Random, picture: np.ndarray, sprites: Sequence[Sprite], scales: Sequence[int]) -> list[Placed]:
    """Paste sprites at random places without overlap; what finds no place at its size is made smaller."""
    side = picture.shape[0]
    scales = list(scales)
    while True:
        shapes = [sprite.pixels[scale].shape[1::-1] for sprite, scale in zip(sprites, scales, strict=True)]
        for _ in range(20):
            centres = arrange(rng, shapes, side)
            if centres is not None:
                pairs = zip(sprites, scales, centres, strict=True)
                return [paste(rng, picture, sprite, scale, *centre) for sprite, scale, centre in pairs]
        scales = [max(SCALES[0], SCALES[max(0, SCALES.index(scale) - 1)]) for scale in scales]


def encode(picture: np.ndarray) -> bytes:
    """JPEG of a float picture in 0..255, at quality 92 without chroma subsampling: thin outlines keep their colour."""
    image = Image.fromarray(np.clip(picture + 0.5, 0, 255).astype(np.uint8))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92, subsampling=0)
    return file.getvalue()
