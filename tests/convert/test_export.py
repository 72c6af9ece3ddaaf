"""The export, used where mmoe cannot be imported, against the composition of its parts here."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from exporting import MODEL, RECIPE, load
from PIL import Image
from tokenizers import Tokenizer

from mmoe.convert import to_hf
from mmoe.convert.ship import MODULES
from mmoe.data.document import tokenize, with_system_prompt
from mmoe.data.pixels import preprocess
from mmoe.data.tokenizer import load_tokenizer
from mmoe.errors import UserError

# The same operations on the same numbers; only the order inside a matrix product may depend on the process.
SAME = {"atol": 1e-5, "rtol": 0}


def test_language_model(exported, foreign):
    with torch.no_grad():
        wanted = exported.whole.language_model(torch.arange(4, 44).view(2, 20)).logits
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(foreign["language"], wanted, **SAME)


def test_whole_model(exported, foreign):
    one = foreign["one"]
    wanted = exported.whole(one["input_ids"], one["pixel_values"])
    torch.testing.assert_close(foreign["one logits"], wanted, **SAME)
    blank = exported.whole(one["input_ids"], torch.zeros_like(one["pixel_values"]))
    assert (blank - wanted).abs().max() > 1e-2


def test_processor_is_the_training_pipeline(exported, foreign, tmp_path):
    record = {"prefix": [{"image": 0}], "branches": [{"prompt": "how many zebras ?", "answer": ""}]}
    for name, text in (("one", ""), ("led", "one word .\n")):
        tokens = tokenize(with_system_prompt(record, text), load_tokenizer(exported.tokenizer), 4).tokens[:-1]
        assert foreign[name]["input_ids"].tolist() == [tokens.tolist()]
    several = foreign["several"]
    pixels = torch.from_numpy(preprocess(_picture(), (32,))[0][32])
    assert several["pixel_values"].shape == (3, 3, 32, 32)
    for shown in (foreign["one"]["pixel_values"][0], several["pixel_values"][0], several["pixel_values"][1]):
        assert torch.equal(shown, pixels)


def _picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8))


def test_special_names_in_a_text_are_plain_text(exported, foreign):
    row = foreign["several"]["input_ids"][1]
    text = Tokenizer.from_file(str(exported.tokenizer)).decode(row.tolist(), skip_special_tokens=True)
    assert text == "a  left of  <eos>"
    assert (row == 2).sum() == 0


def test_generate_answers_about_a_picture(exported, foreign):
    """Greedy decoding with the cache equals choosing the likeliest token anew each time."""
    ids, pixels = foreign["one"]["input_ids"], foreign["one"]["pixel_values"]
    for _ in range(4):
        chosen = exported.whole(ids, pixels)[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, chosen], 1)
        if chosen.item() == 2:
            break
    assert foreign["generated"].tolist() == ids.tolist()
    assert foreign["beams"].shape[0] == 1


def test_rows_of_a_batch_are_as_alone(foreign):
    for row, alone in zip(foreign["several logits"], foreign["alone logits"], strict=True):
        torch.testing.assert_close(row[-alone.shape[1] :], alone[0], **SAME)


def test_copies_of_a_row_keep_its_images_together(foreign):
    a, b, c = foreign["several"]["pixel_values"]
    assert torch.equal(foreign["expanded"], torch.stack([a, a, b, c, b, c]))
    assert not torch.equal(b, c)


def test_errors_of_the_processor_and_the_model(foreign):
    assert foreign["errors"] == [
        "1 pictures for 2 <image> placeholders in the text",
        "1 pictures for 0 <image> placeholders in the text",
        "give a text; <image> in it stands for a picture",
        "0 <image> tokens for 1 images of 4",
    ]


def test_tokenizer_of_the_language_model(exported, foreign):
    wanted = Tokenizer.from_file(str(exported.tokenizer)).encode("how many zebras ?").ids
    assert foreign["language tokens"] == wanted


def test_bf16_keeps_the_router_in_fp32(exported, foreign):
    types = foreign["half types"]
    kept = [name for name, kind in types.items() if kind == "torch.float32"]
    router = ("mlp.router.classifier.weight", "mlp.router.e_score_correction_bias")
    assert sorted(kept) == sorted(f"language_model.model.layers.{i}.{name}" for i in (0, 1) for name in router)
    assert set(types.values()) == {"torch.float32", "torch.bfloat16"}
    # Relative error 2⁻⁸ a weight; a wrong weight would be off by the size of the logits.
    wanted = foreign["one logits"]
    assert (foreign["half logits"].float() - wanted).abs().max() < 0.25 * wanted.abs().max()


def test_files(exported):
    names = {path.name for path in exported.out.iterdir()}
    assert names >= {f"{name}.py" for name in MODULES.values()} | {"README.md", "mmoe_recipe.toml", "language"}
    config = json.loads((exported.out / "config.json").read_text())
    assert config["auto_map"]["AutoModelForImageTextToText"] == "modeling_mmoe.MmoeForConditionalGeneration"
    assert config["dtype"] == "float32"


def test_language_model_alone(exported, tmp_path):
    recipe = dataclasses.replace(RECIPE, model=dataclasses.replace(MODEL, encoders=(), connector=None))
    state = {name: tensor for name, tensor in exported.state.items() if name.startswith("language.")}
    to_hf(Path("checkpoint"), tmp_path / "hf", load=lambda _: (recipe, state, exported.tokenizer))
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "longcat_flash"
    assert not (tmp_path / "hf/language").exists()


def test_exports_over_an_export_but_over_nothing_else(exported, tmp_path):
    again = load(exported.state, exported.tokenizer)
    for _ in range(2):
        to_hf(Path("checkpoint"), tmp_path / "hf", load=again)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        to_hf(Path("checkpoint"), tmp_path / "mine", load=again)
    with pytest.raises(UserError, match="is a file"):
        to_hf(Path("checkpoint"), tmp_path / "mine/thesis.txt", load=again)
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"


def test_a_tensor_that_nothing_reads_is_an_error(exported, tmp_path):
    to_hf(Path("checkpoint"), tmp_path / "hf", load=load(exported.state, exported.tokenizer))
    state = exported.state | {"language.decoder.layers.0.extra": torch.zeros(1)}
    with pytest.raises(UserError, match=r"unread tensor language\.decoder\.layers\.0\.extra"):
        to_hf(Path("checkpoint"), tmp_path / "hf", load=load(state, exported.tokenizer))
    assert (tmp_path / "hf/config.json").is_file(), "an earlier export outlives a failing one"


def test_what_transformers_cannot_express_is_refused(exported, tmp_path):
    moe = dataclasses.replace(MODEL.moe, identity="unscaled")
    recipe = dataclasses.replace(RECIPE, model=dataclasses.replace(MODEL, moe=moe))
    with pytest.raises(UserError, match="this model has 'unscaled'"):
        to_hf(Path("checkpoint"), tmp_path / "hf", load=lambda _: (recipe, exported.state, exported.tokenizer))
    assert not (tmp_path / "hf").exists()


def test_the_ordinary_order_is_refused(exported, tmp_path):
    recipe = dataclasses.replace(
        RECIPE, model=dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, order="sequential"))
    )
    with pytest.raises(UserError, match=r"model\.moe\.order = 'sequential'"):
        to_hf(Path("checkpoint"), tmp_path / "hf", load=lambda _: (recipe, exported.state, exported.tokenizer))
    assert not (tmp_path / "hf").exists()


def test_the_variance_factor_is_exported_as_part_of_the_scaling(exported, tmp_path):
    moe = dataclasses.replace(MODEL.moe, routed_scaling_factor=1.5, variance_factor=4.0)
    recipe = dataclasses.replace(RECIPE, model=dataclasses.replace(MODEL, moe=moe))
    to_hf(Path("checkpoint"), tmp_path / "hf", load=lambda _: (recipe, exported.state, exported.tokenizer))
    assert json.loads((tmp_path / "hf/language/config.json").read_text())["routed_scaling_factor"] == 6.0


def test_unknown_dtype(exported, tmp_path):
    with pytest.raises(UserError, match="fp8"):
        to_hf(Path("checkpoint"), tmp_path / "hf", "fp8", load=load(exported.state, exported.tokenizer))
