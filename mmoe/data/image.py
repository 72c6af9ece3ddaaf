"""Encoded images → pixels, through DALI on the CPU or a GPU.

What an image means is defined in :mod:`mmoe.data.pixels`; here it is done fast. Measured bounds between the two are in
``docs/data.md`` and asserted in the tests.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType
from torch import Tensor

from mmoe.data.pixels import MAX_PIXELS, MEAN, SCALE, BadImage, canonical, open_image, to_rgb

LARGEST_BATCH = 64
"""Images in one run of the pipeline, which holds all of them decoded; ``max_pixels`` bounds their sum too."""


class Decoder:
    """Decodes, resizes and normalises lists of encoded images.

    DALI fails a whole batch for one image that it cannot decode. Such a batch is halved until the culprits stand alone.

    Args:
        image_size: side of the square that every image is resized to, pixels.
        threads: DALI's decoding threads.
        max_pixels: an image whose header announces more is bad.
        device: ``"cpu"``, or ``"mixed"``: nvJPEG, resize and normalisation on the current CUDA device.
    """

    def __init__(
        self,
        image_size: int,
        threads: int = 1,
        max_pixels: int = MAX_PIXELS,
        device: Literal["cpu", "mixed"] = "cpu",
    ) -> None:
        self.image_size, self.threads, self.max_pixels, self.device = image_size, threads, max_pixels, device
        self._cuda = torch.device("cuda", torch.cuda.current_device()) if device == "mixed" else None
        self._pipeline = self._build()

    def __call__(self, images: Sequence[bytes]) -> tuple[Tensor, dict[int, str]]:
        """Decodes ``n`` images.

        Returns:
            float32 ``[n, 3, image_size, image_size]``, normalised (x/255 − 0.5)·4, on the CPU or the CUDA device, a bad
            image all zeros; and why each bad image is bad, by its index.
        """
        bad: dict[int, str] = {}
        shape = (len(images), 3, self.image_size, self.image_size)
        out = torch.zeros(shape, dtype=torch.float32, device=self._cuda)
        run: dict[int, bytes] = {}
        pixels = 0
        # A thread of its own begins on device 0.
        with torch.cuda.device(self._cuda) if self._cuda else nullcontext():
            for i, data in enumerate(images):
                try:
                    image = open_image(data, self.max_pixels)
                    encoded = canonical(image, data)
                except BadImage as error:
                    bad[i] = str(error)
                    continue
                size = image.width * image.height
                if len(run) == LARGEST_BATCH or pixels + size > self.max_pixels:
                    self._decode(run, list(run), out, bad)
                    run, pixels = {}, 0
                run[i] = encoded
                pixels += size
            if run:
                self._decode(run, list(run), out, bad)
        return out, bad

    def _decode(self, encoded: dict[int, bytes], indices: list[int], out: Tensor, bad: dict[int, str]) -> None:
        try:
            pixels = self._run([encoded[i] for i in indices])
        except RuntimeError as error:
            self._pipeline = self._build()  # a pipeline is not valid after an error
            if len(indices) == 1:
                bad[indices[0]] = _why(encoded[indices[0]], error)
                return
            half = len(indices) // 2
            self._decode(encoded, indices[:half], out, bad)
            self._decode(encoded, indices[half:], out, bad)
            return
        out[torch.tensor(indices, device=out.device)] = pixels

    def _run(self, images: list[bytes]) -> Tensor:
        # DALI copies what it is fed before feed_input returns.
        self._pipeline.feed_input("encoded", [np.frombuffer(image, np.uint8) for image in images])
        # Bound to the stream on which the pixels are read, DALI reuses their memory only after that.
        stream = None if self._cuda is None else torch.cuda.current_stream(self._cuda)
        (pixels,) = self._pipeline.run(stream)
        return torch.from_dlpack(pixels.as_tensor())

    def _build(self) -> Pipeline:
        pipeline = Pipeline(
            batch_size=LARGEST_BATCH,
            num_threads=self.threads,
            device_id=None if self._cuda is None else self._cuda.index,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=DALIDataType.UINT8, ndim=1)
            pixels: Any = fn.decoders.image(
                encoded,
                device=self.device,
                output_type=DALIImageType.RGB,
                adjust_orientation=False,  # canonical() has applied it
                jpeg_fancy_upsampling=True,  # as libjpeg-turbo does on the CPU
            )
            pixels = fn.resize(
                pixels,
                size=[self.image_size, self.image_size],
                interp_type=DALIInterpType.INTERP_TRIANGULAR,
                antialias=True,
                dtype=DALIDataType.FLOAT,
            )
            pixels = fn.crop_mirror_normalize(pixels, output_layout="CHW", mean=[MEAN] * 3, std=[SCALE] * 3)
            pipeline.set_outputs(pixels)
        pipeline.build()
        return pipeline


def _why(image: bytes, error: RuntimeError) -> str:
    """Pillow's reason, which says more than DALI's; DALI's own where Pillow has none."""
    try:
        to_rgb(open_image(image, sys.maxsize))
    except BadImage as reason:
        return str(reason)
    return f"DALI cannot decode it: {' '.join(str(error).split())[-200:]}"
