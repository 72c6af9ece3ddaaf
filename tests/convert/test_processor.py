"""The exported image processor on its own: sizes, fit and filter as the recipe has them, by the definition's pixels."""

import dataclasses

import numpy as np
import pytest
import torch
from exporting import MODEL
from PIL import Image

from mmoe.convert.families import longcat
from mmoe.convert.hf.configuration_mmoe import MmoeConfig
from mmoe.convert.hf.modeling_mmoe import MmoeForConditionalGeneration
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


def test_what_it_gives_is_what_generation_takes():
    """Two encoders of two sizes: greedy tokens are the largest logits of the forward pass, with both pictures read."""
    first, second = MODEL.encoders
    encoders = [dataclasses.asdict(first), dataclasses.asdict(dataclasses.replace(second, image_size=16))]
    text = longcat.to_config(MODEL.backbone, MODEL.moe, "float32")
    config = MmoeConfig(text_config=text, encoders=encoders, connector=dataclasses.asdict(MODEL.connector))
    torch.manual_seed(0)
    model = MmoeForConditionalGeneration(config).eval()
    pixels = dict(MmoeImageProcessor([32, 16])(PICTURES[:1]))
    ids = torch.tensor([[1, 3, 3, 3, 3, 7, 8]])
    ones = torch.ones_like(ids)
    made = model.generate(ids, attention_mask=ones, max_new_tokens=3, do_sample=False, pad_token_id=0, **pixels)
    for end in range(7, made.size(1)):
        assert model(made[:, :end], **pixels).logits[0, -1].argmax() == made[0, end]
    logits = model(ids, **pixels).logits
    for name in ("pixel_values_32", "pixel_values_16"):
        assert not torch.equal(model(ids, **(pixels | {name: pixels[name] + 1})).logits, logits)
    with pytest.raises(ValueError, match="pixels_16"):
        model.generate(ids, attention_mask=ones, max_new_tokens=1, pixels_16=pixels["pixel_values_16"])
