"""Loaders of others on the same files: each an endless iterator of how many images its batches have.

All give float32 ``[BATCH, 3, SIZE, SIZE]``, normalised as ours are, with as many decoding threads (or processes).
"""

import io
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.loading.files import Files
from mmoe.data.pixels import MEAN, SCALE

SIZE, BATCH = 224, 32


def dali(files: Files, threads: int) -> Iterator[int]:
    """Its own reader, decoder and resize: nothing of Python between them."""
    import torch
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline
    from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType

    pipeline = Pipeline(BATCH, threads, None, prefetch_queue_depth=2, exec_dynamic=True)
    with pipeline:
        encoded, _ = fn.readers.file(file_root=str(files.root), dir_filters=["loose"], name="reader")
        pixels: Any = fn.decoders.image(encoded, device="cpu", output_type=DALIImageType.RGB)
        pixels = fn.resize(
            pixels,
            size=[SIZE, SIZE],
            interp_type=DALIInterpType.INTERP_TRIANGULAR,
            antialias=True,
            dtype=DALIDataType.FLOAT,
        )
        pipeline.set_outputs(fn.crop_mirror_normalize(pixels, output_layout="CHW", mean=[MEAN] * 3, std=[SCALE] * 3))
    pipeline.build()
    while True:
        (batch,) = pipeline.run()
        yield len(torch.from_dlpack(batch.as_tensor()))


def _threaded(files: Files, threads: int, one: Callable[[bytes], np.ndarray]) -> Iterator[int]:
    """``one`` gives uint8 ``[SIZE, SIZE, 3]``; two batches are under way."""
    pool = ThreadPoolExecutor(threads)
    stream = itertools.cycle(files.images)

    def fill(data: bytes, out: np.ndarray) -> None:
        np.subtract(one(data).transpose(2, 0, 1), np.float32(MEAN), out=out)
        out *= np.float32(1 / SCALE)

    def begin() -> tuple[np.ndarray, list]:
        batch = np.empty((BATCH, 3, SIZE, SIZE), np.float32)
        return batch, [pool.submit(fill, next(stream), batch[i]) for i in range(BATCH)]

    under_way = begin()
    while True:
        following = begin()
        for future in under_way[1]:
            future.result()
        yield len(under_way[0])
        under_way = following


def pil_pixels(data: bytes) -> np.ndarray:
    """Pillow's decoding and its antialiased resize, in 8 bits."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def pil(files: Files, threads: int) -> Iterator[int]:
    return _threaded(files, threads, pil_pixels)


def opencv(files: Files, threads: int) -> Iterator[int]:
    """simplejpeg, and the one resize of OpenCV that is antialiased."""
    import cv2
    import simplejpeg

    cv2.setNumThreads(1)

    def one(data: bytes) -> np.ndarray:
        pixels = simplejpeg.decode_jpeg(data, "RGB")
        return cv2.resize(pixels, (SIZE, SIZE), interpolation=cv2.INTER_AREA)

    return _threaded(files, threads, one)


def normalised(image: Image.Image) -> np.ndarray:
    small = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR), np.float32).transpose(2, 0, 1)
    return (small - np.float32(MEAN)) * np.float32(1 / SCALE)


def webdataset(files: Files, threads: int) -> Iterator[int]:
    """Its usual pipeline: tars, Pillow, a process each decoding thread."""
    from webdataset.compat import WebDataset, WebLoader
    from webdataset.shardlists import split_by_node

    urls = [str(path) for path in files.shards]
    data = WebDataset(urls, resampled=True, shardshuffle=False, nodesplitter=split_by_node)
    data = data.decode("pilrgb", only=["0.jpg"]).to_tuple("0.jpg").map_tuple(normalised).batched(BATCH, partial=False)
    loader = WebLoader(data, batch_size=None, num_workers=threads, multiprocessing_context="spawn")
    for (batch,) in loader:
        yield len(batch)


def energon(files: Files, threads: int) -> Iterator[int]:
    from benchmarks.loading.energon import batches

    return batches(files, threads)


PEERS: dict[str, Callable[[Files, int], Iterator[int]]] = {
    "megatron-energon": energon,
    "webdataset": webdataset,
    "raw DALI": dali,
    "simplejpeg + OpenCV": opencv,
    "PIL": pil,
}
"""Those that fork come first, before there are threads."""
PROCESSES = ("megatron-energon", "webdataset")
"""Those with processes of their own, whose processor time is not counted here."""
