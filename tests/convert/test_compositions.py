"""What transformers has no class for, exported with its code: the logits, an answer, and every tensor back."""

import dataclasses
from pathlib import Path

import exporting
import pytest
import torch
import transformers

from mmoe.checkpoint.load import Loaded, weights
from mmoe.convert import read_hf, to_hf
from mmoe.data.tokenizer import train_tokenizer
from mmoe.recipe import model as tables

LLAMA = dataclasses.replace(exporting.LLAMA, layers=3)
LONGCAT = dataclasses.replace(exporting.MODEL.backbone, layers=3)
VIT = tables.ViT(name="vit", type="vit", image_size=32, patch_size=8, width=16, layers=2, heads=2)
CONVNEXT = tables.ConvNeXt(
    name="convnext", type="convnext", image_size=64, widths=(8, 16), depths=(1, 1), feature_stages=(0, 1), grid=8
)
LINEAR = tables.Linear(type="linear", grid=4)
MLP = tables.MLP(type="mlp", grid=4)
YI_VL = tables.MLP(type="mlp", grid=4, norm=True, newline=True)
JOINT = tables.SVA(grid=4, width=16, heads=2, newline=True, inside=tables.Inside(start=0, stride=2, layers=2))
SEPARATE = tables.SVA(
    grid=4,
    width=16,
    heads=2,
    layers=2,
    groups=(2, 4),
    mixing="sep",
    newline=True,
    mask_padding=True,
    inside=tables.Inside(start=1, stride=1, layers=2),
)
# Each connector with each language model or set of encoders at least once; the paths of either do not know the other.
CASES = {
    "llama, linear": (LLAMA, LINEAR, (VIT,)),
    "longcat, linear, two sizes": (LONGCAT, LINEAR, (VIT, CONVNEXT)),
    "llama, mlp, two sizes": (LLAMA, MLP, (VIT, CONVNEXT)),
    "llama, yi-vl": (LLAMA, YI_VL, (VIT,)),
    "longcat, yi-vl": (LONGCAT, YI_VL, (VIT,)),
    "llama, sva joint inside": (LLAMA, JOINT, (VIT,)),
    "longcat, sva joint inside, two sizes": (LONGCAT, JOINT, (VIT, CONVNEXT)),
    "llama, sva sep, two sizes": (LLAMA, SEPARATE, (VIT, CONVNEXT)),
    "longcat, sva sep": (LONGCAT, SEPARATE, (VIT,)),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["how many zebras ?", " 3", "a frog", "left of"], 300).save(str(path))
    return path


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("name", CASES)
def test_logits_answer_and_tensors(name, tokenizer, tmp_path):
    backbone, connector, encoders = CASES[name]
    moe = exporting.MODEL.moe if isinstance(backbone, tables.Longcat) else None
    shape = tables.Model(backbone=backbone, moe=moe, encoders=encoders, connector=connector)
    recipe = dataclasses.replace(
        exporting.RECIPE, model=shape, data=dataclasses.replace(exporting.RECIPE.data, fit="pad")
    )
    network = exporting.scattered(recipe)
    ours, before = Loaded(recipe, network, tokenizer), dict(weights(network))
    to_hf(tmp_path, tmp_path / "hf", load=lambda _: (recipe, before, tokenizer))

    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    generator = torch.Generator().manual_seed(2)
    images = {side: torch.randn(3, 3, side, side, generator=generator) for side in shape.image_sizes}
    sizes = torch.tensor([[40, 64], [64, 20], [50, 50]])
    picture, one = [3] * connector.tokens, len(images) == 1
    rows = [[1, *picture, 40, *picture, 50, 60], [1, *[70] * connector.tokens, *picture, 80, 90, 95]]
    given = {"pixel_values" if one else f"pixel_values_{side}": part for side, part in images.items()}
    ids = torch.tensor(rows)
    given |= {"input_ids": ids, "original_sizes": sizes}
    wanted = ours.logits(ids, images, sizes)
    with torch.no_grad():
        found = theirs(**given).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    shuffled = ours.logits(ids, {side: part.flip(0) for side, part in images.items()}, sizes)
    assert (shuffled - wanted).abs().max() > 1e-3

    written = theirs.generate(**given, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    for _ in range(3):
        ids = torch.cat([ids, ours.logits(ids, images, sizes)[:, -1].argmax(-1, keepdim=True)], 1)
    # A row that has come to its end goes on with padding.
    until = [row.index(2, len(rows[0])) if 2 in row[len(rows[0]) :] else len(row) for row in ids.tolist()]
    for row, other, end in zip(written.tolist(), ids.tolist(), until, strict=True):
        assert row[:end] == other[:end]

    imported = read_hf(tmp_path / "hf")
    assert imported.recipe == recipe
    assert imported.state.keys() == before.keys()
    assert all(torch.equal(imported.state[key], before[key]) for key in before)
