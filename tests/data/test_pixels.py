"""The definition of what an image means, checked pixel by pixel."""

import io
import struct

import numpy as np
import pytest
from pictures import bad_images, encode, picture, png, save, smooth
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmoe.data.pixels import MEAN, SCALE, BadImage, canonical, open_image, preprocess, resize, to_rgb


def canonical_of(data: bytes) -> bytes:
    return canonical(open_image(data), data)[0]


def rgb(data: bytes) -> np.ndarray:
    return np.asarray(to_rgb(open_image(data)))


def test_gray_becomes_three_equal_channels():
    gray = picture(0)[..., 0]
    assert (rgb(encode(gray)) == gray[..., None]).all()


def test_one_bit_becomes_black_and_white():
    bits = picture(0)[..., 0] > 127
    assert (rgb(save(Image.fromarray(bits), "PNG")) == np.where(bits, 255, 0)[..., None]).all()


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_keep_every_pixel(form):
    pixels = picture(1, 7, 9)
    assert (rgb(encode(pixels, form)) == pixels).all()


def test_webp_lossless_keeps_every_pixel():
    pixels = picture(1, 7, 9)
    assert (rgb(encode(pixels, "WEBP", lossless=True)) == pixels).all()


def test_palette_looks_its_colours_up():
    index = picture(2)[..., 0] % 4
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 8, 7]], np.uint8)
    image = Image.fromarray(index)
    image.putpalette(colours.tobytes())
    assert (rgb(save(image, "PNG")) == colours[index]).all()


def test_a_transparent_palette_colour_becomes_white():
    index = picture(2)[..., 0] % 2
    image = Image.fromarray(index)
    image.putpalette(bytes([10, 20, 30, 40, 50, 60]))
    want = np.where(index[..., None] == 0, np.uint8(255), np.array([40, 50, 60], np.uint8))
    assert (rgb(save(image, "PNG", transparency=0)) == want).all()


def test_alpha_is_laid_over_white():
    pixels, alpha = picture(3), picture(4)[..., :1]
    want = pixels * (alpha / 255) + 255 * (1 - alpha / 255)
    got = rgb(encode(np.concatenate([pixels, alpha], -1)))
    assert np.abs(got - want).max() <= 1
    assert (got[alpha[..., 0] == 0] == 255).all()


def test_gray_with_alpha_is_laid_over_white():
    gray, alpha = picture(3)[..., 0], np.where(picture(4)[..., 0] > 127, 255, 0).astype(np.uint8)
    image = Image.merge("LA", [Image.fromarray(gray), Image.fromarray(alpha)])
    want = np.where(alpha > 0, gray, 255)[..., None]
    assert (rgb(save(image, "PNG")) == want).all()


def test_sixteen_bit_gray_keeps_the_high_byte():
    values = np.array([[0, 255, 256, 65535]], np.uint16)
    assert (rgb(encode(values))[..., 0] == [[0, 0, 1, 255]]).all()


def test_sixteen_bit_colour_keeps_the_high_byte():
    rows = b"\x00" + struct.pack(">6H", 0x0102, 0xFE03, 0x00FF, 0xFFFF, 0x8000, 0x7FFF)
    assert rgb(png(2, 1, 16, 2, rows)).tolist() == [[[1, 254, 0], [255, 128, 127]]]


def test_cmyk_is_converted():
    inks = np.zeros((8, 8, 4), np.uint8)
    inks[:, 4:, 0] = 255
    got = rgb(save(Image.fromarray(inks, "CMYK"), "TIFF"))
    assert (got[:, :4] == 255).all()
    assert (got[:, 4:] == [0, 255, 255]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation):
    pixels = picture(5, 6, 4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels),
    }[orientation]
    data = encode(pixels, exif=exif)
    assert (rgb(data) == turned).all()
    assert (np.asarray(Image.open(io.BytesIO(canonical_of(data)))) == turned).all()


def test_of_an_animation_the_first_frame_counts():
    first, second = Image.fromarray(picture(6)), Image.fromarray(picture(7))
    data = save(first, "WEBP", save_all=True, append_images=[second], lossless=True)
    assert (rgb(data) == picture(6)).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_plain_image_is_canonical_already(form):
    data = encode(picture(8), form)
    assert canonical_of(data) is data


def test_other_images_become_a_plain_png_of_the_same_pixels():
    data = encode(np.concatenate([picture(3), picture(4)[..., :1]], -1))
    again = canonical_of(data)
    assert canonical_of(again) is again
    assert (rgb(again) == rgb(data)).all()


def test_normalisation():
    pixels = picture(9)
    want = (pixels.transpose(2, 0, 1) / 255 - 0.5) * 4
    assert preprocess(encode(pixels), (16,))[0][16] == pytest.approx(want, abs=5e-7)


def test_resize_averages_with_a_triangle_and_goes_on_at_the_border():
    # Halving: taps 1 3 3 1 over four pixels, the outermost ones repeated.
    line = np.array([0, 8, 16, 80], np.float32)
    want = [(0 + 0 + 3 * 8 + 16) / 8, (8 + 3 * 16 + 3 * 80 + 80) / 8]
    assert resize(np.broadcast_to(line, (4, 4)).copy(), 2)[0] == pytest.approx(want)
    assert resize(np.broadcast_to(line[:, None], (4, 4)).copy(), 2)[:, 1] == pytest.approx(want)


def test_resize_keeps_a_picture_of_the_right_size():
    pixels = picture(10)[..., 0].astype(np.float32)
    assert (resize(pixels, 16) == pixels).all()


SHAPES = [(60, 80), (83, 57), (40, 400), (20, 31)]


def processed(image: Image.Image, size: int) -> np.ndarray:
    """float32 ``[3, size, size]``, whole steps: transformers' processor of CLIP, without its normalisation."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        do_rescale=False,
        do_normalize=False,
    )
    return np.asarray(processor(image, return_tensors="np")["pixel_values"][0], np.float32)


def inner(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Without the lines whose filters reach over the border, where Pillow renormalises them."""
    size = pixels.shape[-1]
    y, x = (2 + (length < size) * -(-2 * size // length) for length in (height, width))
    return pixels[:, y:-y, x:-x]


def muted(seed: int, height: int, width: int) -> np.ndarray:
    """A smooth picture within [64, 192]: nothing that Pillow's 8-bit passes would cut."""
    return (smooth(seed, height, width) // 2 + 64).astype(np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [16, 24])
def test_crop_and_cubic_are_clips_processor(shape, size):
    pixels = muted(1, *shape)
    want = processed(Image.fromarray(pixels), size)
    got, original = preprocess(encode(pixels), (size,), "crop", "cubic")
    off = np.abs(got[size] * SCALE + MEAN - want)
    assert original == shape
    # Pillow rounds each pass by half a step; the second weighs the first one's by Σ|w| ≤ 1.25 for a cubic of a = −1/2.
    assert inner(off, *shape).max() <= 0.5 * 1.25 + 0.5 + 0.05


@pytest.mark.parametrize("resample", ["triangular", "cubic"])
@pytest.mark.parametrize("shape", SHAPES)
def test_stretch_is_pillows_resize(shape, resample):
    pixels = muted(2, *shape)
    filters = {"triangular": Image.Resampling.BILINEAR, "cubic": Image.Resampling.BICUBIC}
    want = np.asarray(Image.fromarray(pixels).resize((16, 16), filters[resample]), np.float32).transpose(2, 0, 1)
    got = preprocess(encode(pixels), (16,), "stretch", resample)[0][16] * SCALE + MEAN
    assert inner(np.abs(got - want), *shape).max() <= (1.05 if resample == "triangular" else 1.2)


def expand2square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """As LLaVA-1.5's released `llava/mm_utils.py` pads."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    result = Image.new(image.mode, (side, side), colour)
    result.paste(image, (0, (side - height) // 2) if width > height else ((side - width) // 2, 0))
    return result


@pytest.mark.parametrize("shape", [*SHAPES, (33, 33)])
def test_pad_is_llavas(shape):
    pixels = muted(3, *shape)
    padded = expand2square(Image.fromarray(pixels), (127, 127, 127))
    want = processed(padded, 16)
    got = preprocess(encode(pixels), (16,), "pad", "cubic")[0][16] * SCALE + MEAN
    # As above, and half a step between their gray of 127 and ours of 127.5, by Σ|w|² of both passes.
    bound = 0.5 * 1.25 + 0.5 + 0.05 + 0.5 * 1.25**2
    side = max(shape)
    assert inner(np.abs(got - want), side, side).max() <= bound
    gray = preprocess(encode(muted(3, 10, 80)), (16,), "pad")[0][16]
    assert (gray[:, [0, -1]] == 0).all()


@pytest.mark.parametrize("fit", ["stretch", "crop"])
def test_a_strip_costs_no_more_than_its_pixels(fit):
    """Resized whole and then cropped, as CLIP's processor does, it would have 8 · 160000 pixels first."""
    got, size = preprocess(encode(picture(0, 1, 20000)), (8,), fit)
    assert got[8].shape == (3, 8, 8)
    assert size == (1, 20000)


@pytest.mark.parametrize("case", bad_images())
def test_bad_images_say_why(case):
    data, message = bad_images()[case]
    with pytest.raises(BadImage, match=message):
        preprocess(data, (16,))
