"""The exported image processor on its own: sizes, fit and filter as the recipe has them, by the definition's pixels."""

import numpy as np
import pytest
from PIL import Image

from mmoe.convert.hf.processing_mmoe import MmoeImageProcessor
from mmoe.data.pixels import preprocess

SHAPES = [(30, 44), (21, 20)]
PICTURES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (*shape, 3), dtype=np.uint8))
    for i, shape in enumerate(SHAPES)
]


@pytest.mark.parametrize("size", [16, [16]])
def test_one_size_is_pixel_values(size):
    made = MmoeImageProcessor(size, "crop", "cubic")(PICTURES)
    assert made.keys() == {"pixel_values"}
    want = [preprocess(one, (16,), "crop", "cubic")[0][16] for one in PICTURES]
    assert np.array_equal(made["pixel_values"].numpy(), np.stack(want))


def test_several_sizes_are_a_tensor_each_and_the_pictures_own_sizes(tmp_path):
    MmoeImageProcessor([24, 16], "pad", "cubic").save_pretrained(tmp_path)
    made = MmoeImageProcessor.from_pretrained(tmp_path)(PICTURES)
    assert made.keys() == {"pixel_values_24", "pixel_values_16", "original_sizes"}
    for size in (24, 16):
        want = [preprocess(one, (size,), "pad", "cubic")[0][size] for one in PICTURES]
        assert np.array_equal(made[f"pixel_values_{size}"].numpy(), np.stack(want))
    assert made["original_sizes"].tolist() == [list(shape) for shape in SHAPES]


def test_where_there_is_a_border_to_mask_the_pictures_own_sizes_come_along():
    made = MmoeImageProcessor(16, "pad")(PICTURES)
    assert made.keys() == {"pixel_values", "original_sizes"}
    assert made["original_sizes"].tolist() == [list(shape) for shape in SHAPES]


def test_no_pictures():
    assert MmoeImageProcessor(16)([])["pixel_values"].shape == (0, 3, 16, 16)
    several = MmoeImageProcessor([16, 24])([])
    assert several["pixel_values_24"].shape == (0, 3, 24, 24)
    assert several["original_sizes"].shape == (0, 2)
