"""Growth by stacking: the logits of layers stacked by hand in transformers, and a run that goes on."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

from mmoe.checkpoint.load import resume, state_dict
from mmoe.checkpoint.save import save
from mmoe.convert.families import longcat
from mmoe.convert.grow import deeper, grow
from mmoe.errors import UserError
from mmoe.models.multimodal import build
from mmoe.parallel.optimizer import adam_state
from mmoe.recipe import load_recipe
from mmoe.recipe.schema import Parallel, Precision, Recipe
from mmoe.train import controller
from mmoe.train.step import Stepper

PROGRESS = {"step": 2, "data": {"epoch": 1}, "taken": 2, "skipped_samples": 0}


def batch(seed: int) -> dict:
    tokens = torch.randint(4, 60, (2, 32), generator=torch.Generator().manual_seed(seed))
    return {**small.batch(tokens), "samples": [["a"], ["b"]], "skipped": []}


def trained(folder: Path, recipe: Recipe) -> tuple[Stepper, Path]:
    """Two steps of the small model, saved."""
    small.config()
    run = Stepper(recipe, [build(recipe)])
    for step in range(2):
        run.step(iter([batch(step)]), 0.01)
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    return run, save(folder / "run", 2, run.wrapped, run.optimizer, PROGRESS, recipe, folder / "tokenizer.json")


@pytest.mark.parametrize(("dtype", "distributed"), [("fp32", False), ("bf16", False), ("fp32", True)])
def test_layers_controller_and_moments_are_stacked(tmp_path: Path, dtype: Any, distributed: bool) -> None:
    parallel = Parallel(distributed_optimizer=distributed)
    recipe = dataclasses.replace(small.RECIPE, precision=Precision(dtype=dtype), parallel=parallel)
    run, checkpoint = trained(tmp_path, recipe)
    assert grow(checkpoint, tmp_path / "deep", 3) == tmp_path / "deep/checkpoints/step_00000002"
    grown = load_recipe(tmp_path / "deep/recipe.toml")
    assert grown == deeper(recipe, 3)
    assert grown.model.backbone.layers == 6

    deep = Stepper(grown, [build(grown)])
    assert resume(tmp_path / "deep/checkpoints/step_00000002", deep.wrapped, deep.optimizer) == PROGRESS
    before, after = run.models[0].language, deep.models[0].language
    for layer in range(6):
        old, new = before.decoder.layers[layer % 2], after.decoder.layers[layer]
        for name, value in old.state_dict().items():
            assert torch.equal(new.state_dict()[name], value) if torch.is_tensor(value) else True, name
        for (name, source), copy in zip(old.named_parameters(), new.parameters(), strict=True):
            states = adam_state(run.optimizer, source), adam_state(deep.optimizer, copy)
            assert states[0].keys() == states[1].keys() >= {"exp_avg", "exp_avg_sq", "step", "param"}
            assert all(torch.equal(states[0][part], states[1][part]) for part in states[0]), name
    assert len(controller.routers(deep.models)) == 6
    assert torch.equal(after.output_layer.weight, before.output_layer.weight)
    assert deep.step(iter([batch(2)]), 0.01).taken


def test_logits_equal_layers_stacked_by_hand(tmp_path: Path) -> None:
    _, checkpoint = trained(tmp_path, small.RECIPE)
    recipe, weights, _ = state_dict(grow(checkpoint, tmp_path / "deep"))
    small.config()
    model = small.RECIPE.model
    once = longcat.table(model.backbone, model.moe, fused=True).write(state_dict(checkpoint)[1])
    layers = model.backbone.layers
    twice = dict(once)
    for name, tensor in once.items():
        if name.startswith("model.layers."):
            number, rest = name.removeprefix("model.layers.").split(".", 1)
            twice[f"model.layers.{int(number) + layers}.{rest}"] = tensor
    fields = longcat.to_config(recipe.model.backbone, recipe.model.moe, "float32")
    config = LongcatFlashConfig(**{k: v for k, v in fields.items() if k not in ("architectures", "model_type")})
    theirs = LongcatFlashForCausalLM(config).eval()
    theirs.load_state_dict(twice)
    ours = build(recipe).eval()
    ours.load_state_dict(weights, strict=False)
    ids = batch(5)["tokens"]
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(small.batch(ids)), theirs(ids).logits, rtol=0, atol=1e-4)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 is below 2"):
        grow(tmp_path, tmp_path / "deep", 1)
    with pytest.raises(UserError, match="not an empty directory"):
        grow(tmp_path, tmp_path.parent)
    with pytest.raises(UserError, match="checkpoint without"):
        grow(tmp_path, tmp_path / "deep")
