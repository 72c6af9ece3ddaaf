"""DALI against the definition in mmoe.data.pixels, and bad images among good ones."""

import numpy as np
import pytest
import torch
from pictures import bad_images, encode, picture, png, save, smooth
from PIL import Image

from mmoe.data.image import LARGEST_BATCH, Decoder
from mmoe.data.pixels import SCALE, preprocess

SIZE = 32


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(SIZE)


def difference(decoder: Decoder, data: bytes) -> float:
    """The largest difference to the definition, in steps of 1/255."""
    pixels, bad = decoder([data])
    assert bad == {}
    return float(np.abs(pixels[0].numpy() - preprocess(data, SIZE)).max()) * SCALE


SHAPES = [(32, 32), (64, 64), (33, 31), (200, 150), (480, 640), (20, 16), (1, 1), (1, 300)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("form", "options"),
    [("PNG", {}), ("JPEG", {"quality": 90}), ("JPEG", {"subsampling": 0}), ("JPEG", {"progressive": True})],
)
def test_dali_gives_the_defined_pixels(decoder, shape, form, options):
    # Decoding is exact; a resize sums float32 in another order: 9e-5 measured.
    bound = 0 if shape == (SIZE, SIZE) else 2e-4
    assert difference(decoder, encode(smooth(0, *shape), form, **options)) <= bound


def odd_images() -> dict[str, bytes]:
    pixels, alpha = smooth(1, 40, 50), picture(2, 40, 50)[..., :1]
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = Image.fromarray(pixels).quantize(16)
    return {
        "gray JPEG": encode(pixels[..., 0], "JPEG"),
        "gray PNG": encode(pixels[..., 0]),
        "CMYK JPEG": save(Image.fromarray(pixels).convert("CMYK"), "JPEG"),
        "turned JPEG": encode(pixels, "JPEG", exif=exif),
        "turned PNG": encode(pixels, exif=exif),
        "alpha": encode(np.concatenate([pixels, alpha], -1)),
        "palette": save(palette, "PNG"),
        "transparent palette": save(palette, "PNG", transparency=3),
        "transparent colour": encode(pixels, transparency=tuple(int(v) for v in pixels[0, 0])),
        "16-bit gray": encode(pixels[..., 0].astype(np.uint16) * 257 + 3),
        "16-bit colour": png(1, 1, 16, 2, b"\x00\x01\x80\x02\x80\x03\x80"),
        "one bit": save(Image.fromarray(pixels[..., 0] > 100), "PNG"),
        "gamma": encode(pixels)[:33] + b"\0\0\0\4gAMA\0\1\x86\xa0\x31\xe8\x96\x5f" + encode(pixels)[33:],
        "BMP": encode(pixels, "BMP"),
        "TIFF": encode(pixels, "TIFF"),
        "WebP": encode(pixels, "WEBP"),
    }


@pytest.mark.parametrize("case", odd_images())
def test_odd_images_have_the_defined_pixels(decoder, case):
    assert difference(decoder, odd_images()[case]) <= 2e-4


def test_a_turned_image_is_turned_back(decoder):
    upright, turned = encode(smooth(1, 40, 50)), odd_images()["turned PNG"]
    pixels, _ = decoder([upright, turned])
    torch.testing.assert_close(torch.rot90(pixels[0], -1, (1, 2)), pixels[1], atol=1e-4, rtol=0)


def broken() -> dict[str, bytes]:
    jpeg, whole = encode(smooth(3, 64, 64), "JPEG"), encode(smooth(3, 64, 64))
    return {name: data for name, (data, _) in bad_images().items()} | {
        "JPEG cut in its data": jpeg[: len(jpeg) * 2 // 3],
        "PNG cut in its data": whole[: len(whole) * 2 // 3],
        "PNG without its end": whole[:-10],
        "PNG with a wrong checksum": whole[:60] + bytes([whole[60] ^ 255]) + whole[61:],
    }


@pytest.mark.parametrize("case", broken())
def test_one_bad_image_costs_no_other(decoder, case):
    good = [encode(smooth(seed, 40, 40), "JPEG") for seed in range(5)]
    alone, _ = decoder(good)
    pixels, bad = decoder([*good[:3], broken()[case], *good[3:]])
    assert list(bad) == [3]
    assert bad[3]
    assert not pixels[3].any()
    assert (pixels[[0, 1, 2, 4, 5]] == alone).all()


def test_every_bad_image_is_found(decoder):
    bad = broken()
    good = encode(picture(0))
    images = [data for case in bad.values() for data in (case, good)]
    pixels, found = decoder(images)
    assert sorted(found) == list(range(0, len(images), 2))
    assert (pixels[1::2] == pixels[1]).all()
    assert pixels[1].any()


def test_lists_of_any_length(decoder):
    images = [encode(smooth(seed, 24, 24), "JPEG") for seed in range(2 * LARGEST_BATCH + 3)]
    pixels, bad = decoder(images)
    assert pixels.shape == (len(images), 3, SIZE, SIZE)
    assert pixels.dtype == torch.float32
    assert bad == {}
    for i in (0, LARGEST_BATCH - 1, LARGEST_BATCH, 2 * LARGEST_BATCH + 2):
        assert (decoder([images[i]])[0][0] == pixels[i]).all()
    assert decoder([])[0].shape == (0, 3, SIZE, SIZE)


def test_the_pixels_decoded_at_once_are_bounded(monkeypatch):
    small = Decoder(SIZE, max_pixels=1000)
    runs, run = [], small._run
    monkeypatch.setattr(small, "_run", lambda images: runs.append(len(images)) or run(images))
    shapes = [(10, 40), (10, 40), (10, 40), (20, 50), (5, 5), (10, 20), (10, 70), (10, 9)]
    pixels, bad = small([encode(picture(i, *shape)) for i, shape in enumerate(shapes)])
    assert runs == [2, 1, 1, 3, 1]
    assert bad == {}
    assert all(image.any() for image in pixels)


def test_results_are_not_overwritten_by_the_next_run(decoder):
    first, _ = decoder([encode(picture(1))])
    before = first.clone()
    decoder([encode(picture(2))])
    assert (first == before).all()


def test_the_pixel_bound_is_the_callers():
    pixels, bad = Decoder(SIZE, max_pixels=100)([encode(picture(0, 10, 10)), encode(picture(0, 10, 11))])
    assert list(bad) == [1]
    assert "11x10" in bad[1]
    assert pixels[0].any()
