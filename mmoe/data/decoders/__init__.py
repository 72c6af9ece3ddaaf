"""Encoded images → pixels, by the decoder that the recipe names.

What an image means is defined in :mod:`mmoe.data.pixels`; here it is done fast. Measured bounds between the two are in
``docs/data.md`` and asserted in the tests.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from mmoe.data.pixels import MAX_PIXELS, Fit, Interpolation
from mmoe.recipe.schema import Data


class Decoded(NamedTuple):
    """``n`` images. A bad one is all zeros, of size 1 × 1."""

    images: dict[int, Tensor]
    """Side → float32 ``[n, 3, side, side]``, normalised (x/255 − 0.5)·4, on the CPU or the CUDA device."""
    sizes: Tensor
    """int64 ``[n, 2]``: height and width, upright, before any resize; on the CPU."""
    bad: dict[int, str]
    """Why each bad image is bad, by its index."""


class View(NamedTuple):
    """What is made of every image."""

    sizes: tuple[int, ...]
    """Sides of the squares, pixels."""
    fit: Fit = "stretch"
    interpolation: Interpolation = "triangular"
    max_pixels: int = MAX_PIXELS
    """An image whose header announces more, or that has more once it is padded, is bad."""

    def blank(self, count: int, device: torch.device | None = None) -> dict[int, Tensor]:
        """Zeros for ``count`` images."""
        return {size: torch.zeros((count, 3, size, size), device=device) for size in self.sizes}


class Decoder(Protocol):
    """Decodes lists of encoded images, in the order of the calls; for one thread at a time."""

    def start(self, images: Sequence[bytes]) -> Callable[[], Decoded]:
        """Begins with ``images``; what it returns waits for them. Calls may be waited for in their order only."""
        ...

    def __call__(self, images: Sequence[bytes]) -> Decoded:
        """Decodes ``images`` at once."""
        ...


def build(data: Data, image_sizes: Sequence[int], device: Literal["cpu", "mixed"] = "cpu") -> Decoder:
    """The decoder of the recipe's table ``data``.

    Args:
        image_sizes: sides of the squares that every image becomes; none for a model without encoders.
        device: ``"mixed"`` lets DALI decode on the current CUDA device; the others decode on the CPU all the same.

    Raises:
        UserError: a package that it needs is missing.
    """
    view = View(tuple(image_sizes), data.fit, data.interpolation, data.max_pixels)
    if data.decoder == "dali" and view.sizes:
        from mmoe.data.decoders.dali import DaliDecoder

        return DaliDecoder(view, data.workers, device)
    from mmoe.data.decoders.threads import ThreadDecoder

    return ThreadDecoder(view, data.workers, "simplejpeg" if data.decoder == "simplejpeg" else "pillow")
