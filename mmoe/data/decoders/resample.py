"""The resize of :mod:`mmoe.data.pixels` by torch's antialiased filters: several times as fast.

The triangular one works in 8 bits: its two passes each round to whole steps, so that the result is within one step.
At the border torch renormalises the filter where the definition lets the edge pixel go on. That is put right here:
with E the edge's own result and ω the part of a filter's weight that lies beyond it, out = (1 − ω) · torch's + ω · E,
for the few rows and columns that reach there.
"""

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from mmoe.data.pixels import MEAN, SCALE, SUPPORT, Fit, Interpolation, frame

MODES: dict[Interpolation, str] = {"triangular": "bilinear", "cubic": "bicubic"}
MOST_STRETCHED = 16
"""How many times as long as wide a picture may be that is resized whole to be cropped."""


def supported(height: int, width: int, fit: Fit) -> bool:
    """Whether :func:`normalise_into` takes such a picture."""
    return fit != "crop" or max(height, width) <= MOST_STRETCHED * min(height, width)


def normalise_into(
    out: NDArray[np.float32], rgb: NDArray[np.uint8], size: int, fit: Fit, interpolation: Interpolation
) -> None:
    """uint8 ``[height, width, 3]`` → float32 ``[3, size, size]`` in ``out``, normalised."""
    height, width = rgb.shape[:2]
    canvas, (rows, columns) = frame(height, width, size, fit)
    top, left = (canvas[0] - height) // 2, (canvas[1] - width) // 2
    if fit == "pad" and height != width:
        # Half a step darker than the border is, which no byte can hold.
        padded = np.full((*canvas, 3), math.floor(MEAN), np.uint8)
        padded[top : top + height, left : left + width] = rgb
        rgb = padded
    # The cubic overshoots, and in 8 bits torch would cut that between the passes.
    given = torch.from_numpy(rgb if interpolation == "triangular" else rgb.astype(np.float32)).permute(2, 0, 1)
    whole = out if (rows, columns) == (size, size) else np.empty((3, rows, columns), np.float32)
    _resize_into(whole, given, interpolation)
    if fit == "pad" and height != width:
        lengths = ((canvas[0], top, height), (canvas[1], left, width))
        rows_there, columns_there = (_share(*length, size, interpolation) for length in lengths)
        whole += (MEAN - math.floor(MEAN)) * (1 - rows_there[:, None] * columns_there)
    y, x = (rows - size) // 2, (columns - size) // 2
    np.multiply(whole[:, y : y + size, x : x + size], np.float32(1 / SCALE), out=out)


def _resize_into(out: NDArray[np.float32], pixels: Tensor, interpolation: Interpolation) -> None:
    """``[3, height, width]``, uint8 for the triangular filter → ``[3, rows, columns]`` in ``out``, less the mean."""
    (_, height, width), (_, rows, columns) = pixels.shape, out.shape
    np.subtract(_torch(pixels, rows, columns, interpolation).numpy(), np.float32(MEAN), out=out)
    if across := beyond(width, columns, interpolation):
        edges = _torch(pixels[:, :, :: max(1, width - 1)], rows, 2, interpolation).numpy() - np.float32(MEAN)
        _mend(out, edges, across)
    if down := beyond(height, rows, interpolation):
        lines = np.empty((3, 2, columns), np.float32)
        both = pixels[:, :: height - 1] if height > 1 else pixels.expand(-1, 2, -1)
        _resize_into(lines, both, interpolation)
        _mend(out.transpose(0, 2, 1), lines.transpose(0, 2, 1), down)
    if interpolation == "cubic" and (height, width) != (rows, columns):
        np.clip(out, -MEAN, MEAN, out=out)


def _mend(out: NDArray[np.float32], edges: NDArray[np.float32], parts: Mapping[int, tuple[float, float]]) -> None:
    """Puts columns of ``[3, rows, columns]`` right by the first and the last one's own results, ``[3, rows, 2]``."""
    for i, (before, after) in parts.items():
        mine = out[:, :, i] * np.float32(1 - before - after)
        if before:
            mine += np.float32(before) * edges[:, :, 0]
        if after:
            mine += np.float32(after) * edges[:, :, 1]
        out[:, :, i] = mine


def _torch(pixels: Tensor, rows: int, columns: int, interpolation: Interpolation) -> Tensor:
    if pixels.shape[1:] == (rows, columns):
        return pixels
    # Of one column and in float32, torch 2.13 reads other memory.
    if pixels.size(2) == 1:
        pixels = pixels.expand(-1, -1, 2)
    return interpolate(pixels[None], size=(rows, columns), mode=MODES[interpolation], antialias=True)[0]


def _filters(
    length: int, size: int, interpolation: Interpolation
) -> Iterator[tuple[NDArray[np.integer], NDArray[np.floating]]]:
    """For each of the ``size`` pixels made of ``length``: those that its filter reads, beyond the border too, and their
    weights, of sum 1."""
    scale = length / size
    widened = max(scale, 1.0)
    support = SUPPORT[interpolation] * widened
    for i in range(size):
        center = (i + 0.5) * scale
        taps = np.arange(math.floor(center - support), math.ceil(center + support))
        weights = _weights((taps + (0.5 - center)).astype(np.float64) / widened, interpolation)
        yield taps, weights / weights.sum()


@lru_cache(maxsize=4096)
def beyond(length: int, size: int, interpolation: Interpolation) -> dict[int, tuple[float, float]]:
    """Of the filters that make ``size`` pixels of ``length``: those that reach over the border, with the parts of their
    weight before the first and behind the last pixel."""
    found = {}
    for i, (taps, weights) in enumerate(_filters(length, size, interpolation)):
        before, after = weights[taps < 0].sum(), weights[taps >= length].sum()
        if length != size and (before or after):
            found[i] = float(before), float(after)
    return found


@lru_cache(maxsize=4096)
def _share(canvas: int, start: int, length: int, size: int, interpolation: Interpolation) -> NDArray[np.float32]:
    """float32 ``[size]``: the part of each filter's weight on the ``length`` pixels from ``start``, of ``canvas``."""
    if canvas == length:
        return np.ones(size, np.float32)
    filters = _filters(canvas, size, interpolation)
    return np.array([weights[(taps >= start) & (taps < start + length)].sum() for taps, weights in filters], np.float32)


def _weights(x: NDArray[np.floating], interpolation: Interpolation) -> NDArray[np.floating]:
    x = np.abs(x)
    if interpolation == "triangular":
        return np.maximum(0, 1 - x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))
