"""Every decoder against the definition in mmoe.data.pixels, and bad images among good ones."""

import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from nvidia.dali.pipeline import Pipeline
from pictures import bad_images, encode, picture, png, save, smooth
from PIL import Image

from mmoe.data.decoders import Decoder, View, build
from mmoe.data.decoders.dali import LARGEST_BATCH, DaliDecoder
from mmoe.data.decoders.threads import ThreadDecoder
from mmoe.data.pixels import SCALE, preprocess
from mmoe.errors import UserError
from mmoe.recipe.schema import Data

SIZE = 32
DECODERS = ["dali", "simplejpeg", "pillow"]
BOUND = {
    # Decoding is exact. DALI's resize sums float32 in another order, and looks its cubic up in a table.
    ("dali", "triangular"): 5e-3,
    ("dali", "cubic"): 0.3,
    # Each of two passes rounds to a whole step, by at most a half, and the second keeps the first one's error at most.
    ("simplejpeg", "triangular"): 1.001,
    # Border lines are cut to [0, 255] before they are mixed in.
    ("simplejpeg", "cubic"): 1.0,
    ("pillow", "triangular"): 0.0,
    ("pillow", "cubic"): 0.0,
}
"""On the largest difference to the definition, in steps of 1/255."""


def made(name: str, view: View, threads: int = 1) -> Decoder:
    if name == "dali":
        return DaliDecoder(view, threads)
    return ThreadDecoder(view, threads, "pillow" if name == "pillow" else "simplejpeg")


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return made(request.param, View((SIZE,)))


@pytest.fixture
def bound(decoder: Decoder) -> float:
    if isinstance(decoder, DaliDecoder):
        return BOUND["dali", "triangular"]
    return BOUND["simplejpeg", "triangular"] if decoder._jpeg else 0.0


def pixels_of(decoder: Decoder, images: Sequence[bytes]) -> torch.Tensor:
    pixels, _, bad = decoder(images)
    assert bad == {}
    return pixels[SIZE]


def difference(decoder: Decoder, data: bytes) -> float:
    """The largest difference to the definition, in steps of 1/255."""
    want = preprocess(data, (SIZE,))[0][SIZE]
    return float(np.abs(pixels_of(decoder, [data])[0].numpy() - want).max()) * SCALE


SHAPES = [(32, 32), (64, 64), (33, 31), (200, 150), (480, 640), (20, 16), (1, 1), (1, 300)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("form", "options"),
    [("PNG", {}), ("JPEG", {"quality": 90}), ("JPEG", {"subsampling": 0}), ("JPEG", {"progressive": True})],
)
def test_every_decoder_gives_the_defined_pixels(decoder, bound, shape, form, options):
    limit = 0 if shape == (SIZE, SIZE) else bound
    assert difference(decoder, encode(smooth(0, *shape), form, **options)) <= limit


SIZES, FITTED = (32, 48), [(32, 32), (200, 150), (150, 201), (20, 16), (1, 1), (2, 3), (1, 300), (300, 7), (31, 500)]


@pytest.mark.parametrize("interpolation", ["triangular", "cubic"])
@pytest.mark.parametrize("fit", ["stretch", "pad", "crop"])
@pytest.mark.parametrize("name", DECODERS)
def test_every_size_fit_and_filter(name, fit, interpolation):
    """Noise and smooth pictures: the first moves every pixel by what a filter is off, the second has no aliasing."""
    decoder = made(name, View(SIZES, fit, interpolation), threads=2)
    images = [encode(make(0, *shape)) for make in (smooth, picture) for shape in FITTED]
    pixels, sizes, bad = decoder(images)
    assert bad == {}
    assert sizes.tolist() == [list(shape) for shape in FITTED] * 2
    for i, image in enumerate(images):
        want, _ = preprocess(image, SIZES, fit, interpolation)
        for size in SIZES:
            off = float(np.abs(pixels[size][i].numpy() - want[size]).max()) * SCALE
            assert off <= BOUND[name, interpolation], (FITTED[i % len(FITTED)], size)


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
def test_odd_images_have_the_defined_pixels(decoder, bound, case):
    assert difference(decoder, odd_images()[case]) <= bound


def test_a_turned_image_is_turned_back(decoder, bound):
    upright, turned = encode(smooth(1, 40, 50)), odd_images()["turned PNG"]
    pixels, sizes, _ = decoder([upright, turned])
    one, other = pixels[SIZE]
    torch.testing.assert_close(torch.rot90(one, -1, (1, 2)), other, atol=1e-4 + 2 * bound / SCALE, rtol=0)
    assert sizes.tolist() == [[40, 50], [50, 40]]


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
    alone = pixels_of(decoder, good)
    images, sizes, bad = decoder([*good[:3], broken()[case], *good[3:]])
    pixels = images[SIZE]
    assert list(bad) == [3]
    assert bad[3]
    assert not pixels[3].any()
    assert sizes.tolist() == [[40, 40]] * 3 + [[1, 1]] + [[40, 40]] * 2
    assert (pixels[[0, 1, 2, 4, 5]] == alone).all()


def test_every_bad_image_is_found(decoder):
    bad = broken()
    good = encode(picture(0))
    images = [data for case in bad.values() for data in (case, good)]
    made, _, found = decoder(images)
    pixels = made[SIZE]
    assert sorted(found) == list(range(0, len(images), 2))
    assert (pixels[1::2] == pixels[1]).all()
    assert pixels[1].any()


class Failing:
    """The next ``times`` of a decoder's own runs end with ``error``; those that warm a pipeline up do not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, decoder: DaliDecoder, error: Exception, times: int) -> None:
        self.left = times
        outputs = Pipeline.outputs

        def fail(pipeline: Pipeline, *stream: object) -> object:
            if pipeline is decoder._pipeline and self.left:
                self.left -= 1
                raise error
            return outputs(pipeline, *stream)

        monkeypatch.setattr(Pipeline, "outputs", fail)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("short of memory"), RuntimeError("cannot allocate")])
def test_good_images_are_not_bad_for_want_of_memory(monkeypatch, error):
    dali, good = DaliDecoder(View((SIZE,))), [encode(smooth(seed, 24, 24)) for seed in range(2)]
    want = pixels_of(dali, good)
    # The run, the same again, and its first image alone; the last try of that succeeds.
    failing = Failing(monkeypatch, dali, error, 3)
    assert torch.equal(pixels_of(dali, good), want)
    assert failing.left == 0
    Failing(monkeypatch, dali, error, 4)
    with pytest.raises(RuntimeError) as raised:
        dali(good)
    assert raised.value is error


def test_an_image_that_dali_alone_cannot_decode_is_bad(monkeypatch):
    dali, good = DaliDecoder(View((SIZE,))), [encode(smooth(seed, 24, 24)) for seed in range(2)]
    Failing(monkeypatch, dali, RuntimeError("Unsupported marker"), 4)
    assert dali(good).bad == {0: "DALI cannot decode it: Unsupported marker"}


def test_what_fails_beside_the_decoding_makes_no_image_bad(monkeypatch):
    dali = DaliDecoder(View((SIZE,)))

    def fail(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "from_dlpack", fail)
    with pytest.raises(torch.OutOfMemoryError):
        dali([encode(picture(0))])


def test_lists_of_any_length(decoder):
    images = [encode(smooth(seed, 24, 24), "JPEG") for seed in range(2 * LARGEST_BATCH + 3)]
    pixels = pixels_of(decoder, images)
    assert pixels.shape == (len(images), 3, SIZE, SIZE)
    assert pixels.dtype == torch.float32
    for i in (0, LARGEST_BATCH - 1, LARGEST_BATCH, 2 * LARGEST_BATCH + 2):
        assert (pixels_of(decoder, [images[i]])[0] == pixels[i]).all()
    assert pixels_of(decoder, []).shape == (0, 3, SIZE, SIZE)


def test_lists_under_way_together_come_back_in_their_order(decoder):
    lists = [[encode(smooth(10 * i + j, 24, 24), "JPEG") for j in range(5)] for i in range(6)]
    lists[2][1] = lists[4][0] = b"GIF8"
    lists[3][2] = encode(smooth(0, 64, 64), "JPEG")[:500]
    alone = [decoder(images) for images in lists]
    waiting = [decoder.start(images) for images in lists]
    for want, finish in zip(alone, waiting, strict=True):
        got = finish()
        assert got.bad == want.bad
        assert torch.equal(got.images[SIZE], want.images[SIZE])
        assert torch.equal(got.sizes, want.sizes)
    assert [sorted(got.bad) for got in alone] == [[], [], [1], [2], [0], []]


def test_the_pixels_decoded_at_once_are_bounded(monkeypatch):
    small = DaliDecoder(View((SIZE,), max_pixels=1000))
    runs, feed = [], small._feed
    monkeypatch.setattr(small, "_feed", lambda pipeline, images: runs.append(len(images)) or feed(pipeline, images))
    shapes = [(10, 40), (10, 40), (10, 40), (20, 50), (5, 5), (10, 20), (10, 70), (10, 9)]
    pixels = pixels_of(small, [encode(picture(i, *shape)) for i, shape in enumerate(shapes)])
    assert runs == [2, 1, 1, 3, 1]
    assert all(image.any() for image in pixels)


def test_results_are_not_overwritten_by_the_next_run(decoder):
    first = pixels_of(decoder, [encode(picture(1))])
    before = first.clone()
    for i in range(4):
        decoder([encode(picture(i))])
    assert (first == before).all()


@pytest.mark.parametrize("name", DECODERS)
def test_the_pixel_bound_is_the_callers(name):
    images = [encode(picture(0, 10, 10)), encode(picture(0, 10, 11))]
    pixels, _, bad = made(name, View((SIZE,), max_pixels=100))(images)
    assert list(bad) == [1]
    assert "11x10" in bad[1]
    assert pixels[SIZE][0].any()


@pytest.mark.parametrize("name", DECODERS)
def test_a_strip_that_grows_by_its_padding_is_bounded_too(name):
    images = [encode(picture(0, 10, 10)), encode(picture(0, 2, 11))]
    _, _, bad = made(name, View((SIZE,), "pad", max_pixels=100))(images)
    assert list(bad) == [1]
    assert "padded to 11x11" in bad[1]


def test_the_recipe_names_the_decoder(monkeypatch):
    data = Data(mixture="none", workers=2, fit="crop", interpolation="cubic", max_pixels=77)
    made = build(data, (16, 24))
    assert isinstance(made, DaliDecoder)
    assert (made.view, made.threads) == (View((16, 24), "crop", "cubic", 77), 2)
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(UserError, match=r"simplejpeg is not installed.*pip install simplejpeg"):
        build(Data(mixture="none", decoder="simplejpeg"), (16,))
    assert isinstance(build(Data(mixture="none", decoder="pillow"), (16,)), ThreadDecoder)


@pytest.mark.parametrize("name", DECODERS)
def test_a_model_without_encoders_has_no_images(name):
    decoded = build(Data(mixture="none", decoder=name), ())([])
    assert decoded.images == {}
    assert decoded.sizes.shape == (0, 2)
