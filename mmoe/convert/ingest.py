"""From a Hugging Face directory to a checkpoint."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmoe.convert.export import RECIPE
from mmoe.convert.families import longcat, multimodal
from mmoe.errors import UserError
from mmoe.recipe.load import load_recipe
from mmoe.recipe.schema import MTP, Data, Model, Optimizer, Parallel, Recipe, Train


class Imported(NamedTuple):
    """What a directory holds. ``tokenizer`` need not exist; ``notes`` names what was left out on purpose."""

    recipe: Recipe
    state: dict[str, Tensor]
    tokenizer: Path
    notes: list[str]


def read_hf(directory: Path) -> Imported:
    """Read an export of ours, its ``language`` folder, or another ``LongcatFlashForCausalLM``.

    A directory without our recipe gives one that names the model and leaves data and training to be chosen.

    Raises:
        UserError: a file is missing or unreadable, or tensors and configuration do not fit.
    """
    config = _config(directory)
    tensors = _tensors(directory)
    mtp = MTP() if any(longcat.MTP in name for name in tensors) else None
    fused = any(name.endswith("experts.gate_up_proj") for name in tensors)
    where = str(directory / "config.json")
    if config.get("model_type") == "mmoe":
        model = dataclasses.replace(multimodal.from_config(config, where), mtp=mtp)
        table = multimodal.table(model, fused=fused)
    else:
        backbone, moe = longcat.from_config(config, where)
        model = Model(backbone=backbone, moe=moe, mtp=mtp)
        table = longcat.table(backbone, moe, fused=fused, mtp=mtp is not None)
    recipe = load_recipe(directory / RECIPE) if (directory / RECIPE).is_file() else _recipe(directory, model)
    unread = "gate and up projections of zero experts are not read: no computation uses them"
    notes = [unread] if model.moe.zero_experts else []
    return Imported(recipe, table.read(tensors, str(directory)), directory / "tokenizer.json", notes)


def from_hf(directory: Path, out: Path) -> None:
    """Write the model in ``directory`` as the checkpoint OUT/checkpoints/step_00000000.

    Raises:
        UserError: see :func:`read_hf`; or OUT is not empty, or the directory has no tokenizer.json.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("is not an empty directory", str(out), "name another one")
    imported = read_hf(directory)
    if not imported.tokenizer.is_file():
        raise UserError("no tokenizer.json", str(directory), "put the model's tokenizer there")
    for note in imported.notes:
        print(note)
    _save(imported, out)


def _save(imported: Imported, out: Path) -> None:
    from mmoe.checkpoint.load import fill
    from mmoe.checkpoint.save import save
    from mmoe.models.multimodal import build
    from mmoe.parallel import engine

    engine.start(Parallel(), imported.recipe.train.seed)
    network = build(imported.recipe)
    fill(network, imported.state)
    save(out, 0, [network], None, {}, imported.recipe, imported.tokenizer)


def _config(directory: Path) -> dict[str, Any]:
    try:
        return json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("no config.json", str(directory), "name a Hugging Face model directory") from None
    except (ValueError, OSError) as error:
        raise UserError(f"unreadable config.json: {error}", str(directory), "export the model again") from None


def _tensors(directory: Path) -> dict[str, Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError("no .safetensors files", str(directory), "name a Hugging Face model directory")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as reader:
                tensors |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError) as error:
            raise UserError(f"unreadable: {error}", str(file), "copy or export the file again") from None
    return tensors


def _recipe(directory: Path, model: Model) -> Recipe:
    return Recipe(
        name=directory.resolve().name,
        description="imported from Hugging Face format; data and training are still to be chosen",
        model=model,
        data=Data(mixture="unset", sequence_length=min(1024, model.backbone.max_position)),
        train=Train(steps=1, global_batch=1, micro_batch=1),
        optimizer=Optimizer(lr=1e-4),
    )
