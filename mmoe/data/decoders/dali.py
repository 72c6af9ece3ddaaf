"""DALI, on the CPU or a GPU."""

import io
import re
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from nvidia.dali import fn, math
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType
from PIL import Image
from torch import Tensor

from mmoe.data.decoders import Decoded, View
from mmoe.data.pixels import MEAN, SCALE, BadImage, canonical, check_frame, frame, open_image, to_rgb, window

LARGEST_BATCH = 64
"""Images in one run of the pipeline, which holds all of them decoded; ``max_pixels`` bounds their sum too."""
AHEAD = 2
"""Runs under way: one thread is done with its last image before the others are, and goes on with the next run."""
FILTERS = {"triangular": DALIInterpType.INTERP_TRIANGULAR, "cubic": DALIInterpType.INTERP_CUBIC}
_SHORTAGE = re.compile(r"alloc|memory|\bcuda", re.IGNORECASE)
"""In DALI's errors that are not the image's."""


class _Image(NamedTuple):
    index: int
    encoded: bytes
    height: int
    width: int


def _dot() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (1, 1)).save(out, "PNG")
    return out.getvalue()


DOT = _Image(0, _dot(), 1, 1)
"""To warm a pipeline up with."""


@dataclass(eq=False)
class _Call:
    """A list of images on the way; ``images`` is made when its first run is done."""

    count: int
    sizes: Tensor
    bad: dict[int, str] = field(default_factory=dict)
    images: dict[int, Tensor] | None = None
    runs: int = 0
    """Not yet done."""


@dataclass(eq=False)
class _Run:
    call: _Call
    images: list[_Image]


class DaliDecoder:
    """See :class:`mmoe.data.decoders.Decoder`.

    DALI fails a whole run for one image that it cannot decode. Such a run is halved until the culprits stand alone. An
    image is bad where Pillow cannot decode it either; else DALI has one more try, and its error is raised.

    Args:
        view: what is made of every image.
        threads: DALI's decoding threads.
        device: ``"cpu"``, or ``"mixed"``: nvJPEG, resize and normalisation on the current CUDA device.
    """

    def __init__(self, view: View, threads: int = 1, device: Literal["cpu", "mixed"] = "cpu") -> None:
        self.view, self.threads, self.device = view, threads, device
        self._cuda = torch.device("cuda", torch.cuda.current_device()) if device == "mixed" else None
        self._under_way: deque[_Run] = deque()
        self._pipeline = self._build()

    def __call__(self, images: Sequence[bytes]) -> Decoded:
        return self.start(images)()

    def start(self, images: Sequence[bytes]) -> Callable[[], Decoded]:
        call = _Call(len(images), torch.ones(len(images), 2, dtype=torch.int64))
        run: list[_Image] = []
        pixels = 0
        with self._on_device():
            for i, data in enumerate(images):
                try:
                    image = self._opened(i, data)
                except BadImage as error:
                    call.bad[i] = str(error)
                    continue
                side = max(image.height, image.width)
                size = side * side if self.view.fit == "pad" else image.height * image.width
                if len(run) == LARGEST_BATCH or pixels + size > self.view.max_pixels:
                    self._schedule(_Run(call, run))
                    run, pixels = [], 0
                run.append(image)
                pixels += size
            if run:
                self._schedule(_Run(call, run))
        return lambda: self._finish(call)

    def _opened(self, index: int, data: bytes) -> _Image:
        encoded, (height, width) = canonical(open_image(data, self.view.max_pixels), data)
        for size in self.view.sizes:
            check_frame(frame(height, width, size, self.view.fit), self.view.max_pixels)
        return _Image(index, encoded, height, width)

    def _finish(self, call: _Call) -> Decoded:
        with self._on_device():
            while call.runs:
                self._collect()
            images = self.view.blank(call.count, self._cuda) if call.images is None else call.images
        return Decoded(images, call.sizes, call.bad)

    def _on_device(self) -> AbstractContextManager[Any]:
        """A thread of its own begins on device 0."""
        return torch.cuda.device(self._cuda) if self._cuda else nullcontext()

    def _schedule(self, run: _Run) -> None:
        if len(self._under_way) == AHEAD:
            self._collect()
        run.call.runs += 1
        self._feed(self._pipeline, run.images)
        self._pipeline.schedule_run()
        self._under_way.append(run)

    def _collect(self) -> None:
        """Waits for the oldest run."""
        run = self._under_way.popleft()
        try:
            outputs = self._outputs()
        except RuntimeError:
            # A pipeline is not valid after an error: the runs behind it are lost as well.
            lost = [run, *self._under_way]
            self._under_way.clear()
            self._pipeline = self._build()
            for one in lost:
                self._halve(one, one.images)
                one.call.runs -= 1
            return
        self._enter(run, outputs)
        run.call.runs -= 1

    def _halve(self, run: _Run, images: list[_Image]) -> None:
        """Raises RuntimeError, DALI's, where it is short of memory for an image that Pillow decodes, twice."""
        self._feed(self._pipeline, images)
        self._pipeline.schedule_run()
        try:
            outputs = self._outputs()
        except RuntimeError:
            self._pipeline = self._build()
            if len(images) > 1:
                half = len(images) // 2
                self._halve(run, images[:half])
                self._halve(run, images[half:])
                return
            if reason := _why_bad(images[0].encoded):
                run.call.bad[images[0].index] = reason
                return
            # Pillow decodes it: the memory or the device is short, for now or for good, or DALI has no way with it.
            self._feed(self._pipeline, images)
            self._pipeline.schedule_run()
            try:
                outputs = self._outputs()
            except RuntimeError as error:
                if _SHORTAGE.search(str(error)):
                    raise
                self._pipeline = self._build()
                run.call.bad[images[0].index] = f"DALI cannot decode it: {' '.join(str(error).split())[-200:]}"
                return
        self._enter(_Run(run.call, images), outputs)

    def _enter(self, run: _Run, outputs: Sequence[Any]) -> None:
        pixels = [torch.from_dlpack(batch.as_tensor()) for batch in outputs]
        call, indices = run.call, torch.tensor([image.index for image in run.images])
        call.sizes[indices] = torch.tensor([(image.height, image.width) for image in run.images])
        if len(indices) == call.count:
            call.images = dict(zip(self.view.sizes, pixels, strict=True))
            return
        if call.images is None:
            call.images = self.view.blank(call.count, self._cuda)
        for size, one in zip(self.view.sizes, pixels, strict=True):
            call.images[size].index_copy_(0, indices.to(one.device), one)

    def _feed(self, pipeline: Pipeline, images: list[_Image]) -> None:
        """DALI copies what it is fed before feed_input returns."""
        pipeline.feed_input("encoded", [np.frombuffer(image.encoded, np.uint8) for image in images])
        if self.view.fit == "pad":
            pipeline.feed_input("side", [np.array(max(image.height, image.width), np.float32) for image in images])
        if self.view.fit == "crop":
            for size in self.view.sizes:
                shown = [window(frame(image.height, image.width, size, "crop"), size) for image in images]
                corners = np.array(shown, np.float32)
                pipeline.feed_input(f"start {size}", list(corners[:, :2]))
                pipeline.feed_input(f"end {size}", list(corners[:, 2:]))

    def _outputs(self) -> Sequence[Any]:
        """A batch of pixels for each size, or DALI's error of the run."""
        # Bound to the stream on which the pixels are read, DALI reuses their memory only after that.
        stream = None if self._cuda is None else torch.cuda.current_stream(self._cuda)
        return self._pipeline.outputs(stream)

    def _build(self) -> Pipeline:
        pipeline = Pipeline(
            batch_size=LARGEST_BATCH,
            num_threads=self.threads,
            device_id=None if self._cuda is None else self._cuda.index,
            prefetch_queue_depth=AHEAD,
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
            if self.view.fit == "pad":
                side = fn.external_source(name="side", dtype=DALIDataType.FLOAT, ndim=0)
                pixels = fn.crop(
                    pixels,
                    crop_h=side,
                    crop_w=side,
                    out_of_bounds_policy="pad",
                    fill_values=[MEAN],
                    rounding="truncate",
                    dtype=DALIDataType.FLOAT,
                )
            pipeline.set_outputs(*(self._view(pixels, size) for size in self.view.sizes))
        pipeline.build()
        # The first scheduling runs a pipeline as often as its queue is deep.
        for _ in range(AHEAD):
            self._feed(pipeline, [DOT])
        pipeline.schedule_run()
        for _ in range(AHEAD):
            pipeline.outputs()
        return pipeline

    def _view(self, pixels: Any, size: int) -> Any:
        shown: dict[str, Any] = {}
        if self.view.fit == "crop":
            for name in ("start", "end"):
                shown[f"roi_{name}"] = fn.external_source(name=f"{name} {size}", dtype=DALIDataType.FLOAT, ndim=1)
        resized: Any = fn.resize(
            pixels,
            size=[size, size],
            interp_type=FILTERS[self.view.interpolation],
            antialias=True,
            dtype=DALIDataType.FLOAT,
            **shown,
        )
        if self.view.interpolation == "cubic":
            resized = math.clamp(resized, 0.0, 255.0)
        return fn.crop_mirror_normalize(resized, output_layout="CHW", mean=[MEAN] * 3, std=[SCALE] * 3)


def _why_bad(image: bytes) -> str | None:
    """Pillow's reason, which says more than DALI's; None where it decodes the image."""
    try:
        to_rgb(open_image(image, sys.maxsize))
    except BadImage as reason:
        return str(reason)
    return None
