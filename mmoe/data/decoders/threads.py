"""Decoders that take an image at a time, in threads: both let go of Python's lock while they work."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mmoe.data.decoders import Decoded, View
from mmoe.data.decoders.resample import normalise_into, supported
from mmoe.data.pixels import BadImage, check_frame, frame, is_plain, normalised, open_image, to_rgb
from mmoe.errors import UserError


class ThreadDecoder:
    """See :class:`mmoe.data.decoders.Decoder`.

    Args:
        view: what is made of every image.
        threads: how many.
        library: ``pillow`` is the definition; ``simplejpeg`` decodes plain JPEG by libjpeg-turbo and resizes in 8 bits
            (:mod:`mmoe.data.decoders.resample`).

    Raises:
        UserError: simplejpeg is not installed.
    """

    def __init__(self, view: View, threads: int, library: Literal["pillow", "simplejpeg"]) -> None:
        self.view = view
        self._jpeg = _simplejpeg() if library == "simplejpeg" else None
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mmoe-decoder")

    def __call__(self, images: Sequence[bytes]) -> Decoded:
        return self.start(images)()

    def start(self, images: Sequence[bytes]) -> Callable[[], Decoded]:
        made = {size: torch.empty(len(images), 3, size, size) for size in self.view.sizes}
        sizes = torch.ones(len(images), 2, dtype=torch.int64)
        arrays = {size: pixels.numpy() for size, pixels in made.items()}

        def one(index: int) -> tuple[int, int]:
            return self._decode(images[index], {size: array[index] for size, array in arrays.items()})

        futures = [self._pool.submit(one, index) for index in range(len(images))]

        def finish() -> Decoded:
            bad: dict[int, str] = {}
            for index, future in enumerate(futures):
                try:
                    sizes[index] = torch.tensor(future.result())
                except BadImage as error:
                    bad[index] = str(error)
                    for pixels in made.values():
                        pixels[index] = 0
            return Decoded(made, sizes, bad)

        return finish

    def _decode(self, data: bytes, out: dict[int, NDArray[np.float32]]) -> tuple[int, int]:
        """Fills ``out``; returns height and width."""
        view = self.view
        image = open_image(data, view.max_pixels)
        rgb = self._jpeg(data) if self._jpeg and image.format == "JPEG" and is_plain(image, data) else None
        if rgb is None:
            rgb = np.array(to_rgb(image))
        height, width = rgb.shape[:2]
        exact = self._jpeg is None or not supported(height, width, view.fit)
        for size, pixels in out.items():
            check_frame(frame(height, width, size, view.fit), view.max_pixels)
            if exact:
                pixels[:] = normalised(Image.fromarray(rgb), size, view.fit, view.interpolation)
            else:
                normalise_into(pixels, rgb, size, view.fit, view.interpolation)
        return height, width


def _simplejpeg() -> Callable[[bytes], NDArray[np.uint8] | None]:
    try:
        import simplejpeg
    except ImportError:
        raise UserError(
            "simplejpeg is not installed", 'data.decoder = "simplejpeg"', "pip install simplejpeg"
        ) from None

    def decode(data: bytes) -> NDArray[np.uint8] | None:
        """uint8 ``[height, width, 3]``; None leaves it to Pillow, which says what is wrong, or that nothing is."""
        try:
            return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:
            return None

    return decode
