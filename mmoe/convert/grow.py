"""A deeper model from a trained one by stacking its layers (arXiv 2509.01322, on model growth; arXiv 2405.15319)."""

import dataclasses
import re
from pathlib import Path

import torch

from mmoe.checkpoint import layout
from mmoe.checkpoint.load import resume
from mmoe.checkpoint.save import save
from mmoe.errors import UserError
from mmoe.models.multimodal import build
from mmoe.parallel import engine
from mmoe.parallel.optimizer import adam_state
from mmoe.recipe.load import dump_recipe, load_recipe
from mmoe.recipe.schema import Parallel, Recipe
from mmoe.train.step import Stepper

_LAYER = re.compile(r"(?<=language\.decoder\.layers\.)\d+(?=\.)")


def deeper(recipe: Recipe, factor: int) -> Recipe:
    """``recipe`` with ``factor`` times its layers and everything else as it is."""
    backbone = dataclasses.replace(recipe.model.backbone, layers=factor * recipe.model.backbone.layers)
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, backbone=backbone))


def grow(checkpoint: Path, out: Path, factor: int = 2) -> Path:
    """Writes OUT as a run with ``factor`` times the layers that goes on where ``checkpoint`` stands.

    Layer i of L becomes the layers i, i + L, …: weights, controller, and Adam's moments, which are each copy's best
    guess of its own. Everything else is kept: step, position in the data, counters, random state, and with the step the
    learning rate. ``mmoe train OUT/recipe.toml --out OUT --resume`` goes on. Works on one process.

    Returns the new checkpoint's folder.

    Raises:
        UserError: ``factor`` is below 2, OUT is not empty, or the checkpoint is damaged or no run's.
    """
    if factor < 2:
        raise UserError(f"{factor} is below 2", "--factor", "give how many times the layers are stacked")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("is not an empty directory", str(out), "name another one")
    layout.verify(checkpoint)
    recipe = load_recipe(checkpoint / "recipe.toml")
    grown, alone = deeper(recipe, factor), Parallel(distributed_optimizer=recipe.parallel.distributed_optimizer)
    engine.start(alone, recipe.train.seed, alone=True)
    small, large = (
        Stepper(part, [build(part)]) for part in (dataclasses.replace(r, parallel=alone) for r in (recipe, grown))
    )
    progress = resume(checkpoint, small.wrapped, small.optimizer)
    if "step" not in progress:
        raise UserError("was imported, not trained: no run goes on from it", str(checkpoint), "train it first")

    old, new = small.models[0], large.models[0]

    def origin(name: str) -> str:
        return _LAYER.sub(lambda number: str(int(number[0]) % recipe.model.backbone.layers), name)

    state, parameters = old.state_dict(), dict(old.named_parameters())
    new.load_state_dict({name: state[origin(name)] for name in new.state_dict()})
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            source = adam_state(small.optimizer, parameters[origin(name)])
            for part, tensor in adam_state(large.optimizer, parameter).items():
                tensor.copy_(source[part])
    path = save(out, progress["step"], large.wrapped, large.optimizer, progress, grown, checkpoint / "tokenizer.json")
    (out / "recipe.toml").write_text(dump_recipe(grown))
    return path
