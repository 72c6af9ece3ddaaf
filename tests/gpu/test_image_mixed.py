"""The decoder's `mixed` pipeline: nvJPEG, resize and normalisation on the GPU, handed over by DLPack."""

import threading

import numpy as np
import pytest
import torch
from pictures import bad_images, encode, picture, smooth

from mmoe.data.decoders import View
from mmoe.data.decoders.dali import LARGEST_BATCH, DaliDecoder
from mmoe.data.pixels import SCALE, preprocess

pytestmark = pytest.mark.gpu
SIZE = 32


@pytest.fixture(scope="module")
def decoder() -> DaliDecoder:
    return DaliDecoder(View((SIZE,)), device="mixed")


def difference(decoder: DaliDecoder, data: bytes) -> float:
    """The largest difference to the definition, in steps of 1/255."""
    images, _, bad = decoder([data])
    pixels = images[SIZE]
    assert bad == {}
    assert pixels.is_cuda
    return float(np.abs(pixels[0].cpu().numpy() - preprocess(data, (SIZE,))[0][SIZE]).max()) * SCALE


@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (200, 150), (20, 16), (1, 1)])
def test_png_has_the_defined_pixels(decoder, shape):
    # PNG is lossless; the GPU's resize sums float32 in an order of its own.
    assert difference(decoder, encode(smooth(0, *shape))) <= 0.01


@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (200, 150), (16, 24)])
@pytest.mark.parametrize("options", [{"quality": 90}, {"subsampling": 0}, {"progressive": True}])
def test_jpeg_is_near_the_defined_pixels(decoder, shape, options):
    # nvJPEG rounds its inverse cosine transform, upsampling and colour conversion otherwise: about one step each.
    assert difference(decoder, encode(smooth(0, *shape), "JPEG", **options)) <= 4


def test_one_bad_image_costs_no_other(decoder):
    good = [encode(smooth(seed, 40, 40), "JPEG") for seed in range(4)]
    jpeg = encode(smooth(9, 64, 64), "JPEG")
    broken = [image for image, _ in bad_images().values()] + [jpeg[: len(jpeg) // 2]]
    alone = decoder(good).images[SIZE]
    for image in broken:
        images, _, bad = decoder([*good[:2], image, *good[2:]])
        pixels = images[SIZE]
        assert list(bad) == [2]
        assert not pixels[2].any()
        assert torch.equal(pixels[[0, 1, 3, 4]], alone)


def test_pixels_are_ready_on_the_stream_that_asked(decoder):
    images = [encode(smooth(seed, 300, 300), "JPEG") for seed in range(LARGEST_BATCH)]
    want = decoder(images).images[SIZE]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(20):
            got = decoder(images).images[SIZE] + 0
            decoder(images[::-1])
            assert torch.equal(got, want)


def test_decoding_in_a_thread_lands_on_the_device_it_was_made_for(decoder):
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    with torch.cuda.device(device):
        last = DaliDecoder(View((SIZE,)), device="mixed")
    out = []
    thread = threading.Thread(target=lambda: out.append(last([encode(picture(0))]).images[SIZE]))
    thread.start()
    thread.join()
    assert out[0].device == device
    assert torch.equal(out[0].cpu(), decoder([encode(picture(0))]).images[SIZE].cpu())
