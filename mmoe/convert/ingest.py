"""From a Hugging Face directory to a checkpoint."""

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmoe import reading
from mmoe.convert.export import RECIPE
from mmoe.convert.families import longcat, multimodal
from mmoe.errors import UserError
from mmoe.recipe.checks import encoder_grid, model_problems
from mmoe.recipe.load import load_recipe
from mmoe.recipe.model import MTP, Model
from mmoe.recipe.schema import Data, Optimizer, Parallel, Recipe, Train

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_CONFIG = 1 << 24
"""Bytes."""


class Imported(NamedTuple):
    """What a directory holds. ``tokenizer`` need not exist; ``notes`` names what was left out on purpose."""

    recipe: Recipe
    state: dict[str, Tensor]
    tokenizer: Path
    notes: list[str]


def read_hf(directory: Path) -> Imported:
    """Read an export of ours, its ``language`` folder, or another ``LongcatFlashForCausalLM``.

    A directory without our recipe gives one that names the model and leaves data and training to be chosen. Nothing in
    it is run, no pickle is read, and no file that an index of it names: its own ``*.safetensors`` are. They may be
    links, as in the hub's cache.

    Raises:
        UserError: a file is missing or unreadable, or tensors and configuration do not fit.
    """
    config = _config(directory)
    tensors = _tensors(directory)
    mtp = MTP() if any(longcat.MTP in name for name in tensors) else None
    fused = any(name.endswith("experts.gate_up_proj") for name in tensors)
    where = str(directory / "config.json")
    whole = config.get("model_type") == "mmoe"
    if whole:
        model = dataclasses.replace(multimodal.from_config(config, where), mtp=mtp)
    else:
        backbone, moe = longcat.from_config(config, where)
        model = Model(backbone=backbone, moe=moe, mtp=mtp)
    _plausible(model, tensors, where)
    if whole:
        table = multimodal.table(model, fused=fused)
    else:
        table = longcat.table(model.backbone, model.moe, fused=fused, mtp=mtp is not None)
    if (directory / RECIPE).exists():
        recipe = load_recipe(directory / RECIPE)
        _plausible(recipe.model, tensors, str(directory / RECIPE))  # its model is the one that is built
    else:
        recipe = _recipe(directory, model)
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
    from mmoe.checkpoint.load import fill, weights
    from mmoe.checkpoint.save import save
    from mmoe.models.multimodal import build
    from mmoe.parallel import engine

    engine.start(Parallel(), imported.recipe.train.seed)
    with torch.device("meta"):  # what its sizes make together is known before any of it takes memory
        wanted = {name: tensor.shape for name, tensor in weights(build(imported.recipe)).items()}
    _fits(wanted, imported)
    network = build(imported.recipe)
    fill(network, imported.state)
    save(out, 0, [network], None, {}, imported.recipe, imported.tokenizer)


def _config(directory: Path) -> dict[str, Any]:
    try:
        return reading.json_object(reading.text(directory / "config.json", LARGEST_CONFIG))
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
            os.close(reading.open_regular(file))
            with safe_open(file, "pt") as reader:
                found = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"unreadable: {error}", str(file), "copy or export the file again") from None
        for name, tensor in found.items():
            if tensor.dtype not in DTYPES:
                raise UserError(f"tensor {name} is {tensor.dtype}", str(file), "export it in fp32, bf16 or fp16")
            if name in tensors:
                raise UserError(f"tensor {name} is in another file too", str(file), "leave one of the files")
        tensors |= found
    return tensors


def _plausible(model: Model, tensors: dict[str, Tensor], where: str) -> None:
    """Raises :class:`UserError` where the configuration cannot be that of ``tensors``, before any size in it is taken.

    Every layer has a tensor of its own, as has every expert unless they are fused, and every other size is a dimension
    of one.
    """
    for path, what, fix in model_problems(model):
        raise UserError(f"{path}: {what}", where, fix)
    parts = (model.backbone, model.moe, *model.encoders, *([model.connector] if model.connector else []))
    layers = model.backbone.layers + (model.connector.layers if model.connector else 0)
    layers += sum(encoder.layers if encoder.type == "vit" else len(encoder.widths) for encoder in model.encoders)
    if not any(name.endswith("experts.gate_up_proj") for name in tensors):
        layers = max(layers, model.backbone.layers * model.moe.experts)
    elements = sum(tensor.numel() for tensor in tensors.values())
    free = ("max_position", "image_size", "balance_groups")
    sizes = [value for part in parts for name, value in vars(part).items() if type(value) is int and name not in free]
    rows = model.backbone.layers * (model.moe.experts + model.moe.zero_experts)
    if layers > len(tensors) or max(*sizes, rows) > elements:
        what = f"it tells of {layers} layers or experts and sizes up to {max(*sizes, rows)}"
        what = f"{what}, the {len(tensors)} tensors have {elements} numbers"
        raise UserError(what, where, "the weights do not fit the configuration")
    longest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    widths = [width for encoder in model.encoders if encoder.type == "convnet" for width in encoder.widths]
    places = [encoder_grid(encoder) ** 2 for encoder in model.encoders if encoder.type == "vit"]
    everyone = model.moe.experts + model.moe.zero_experts
    if max([*widths, *places, everyone]) > longest:
        what = f"it tells of sizes up to {max([*widths, *places, everyone])}, no tensor's is above {longest}"
        raise UserError(what, where, "the weights do not fit the configuration")


def _fits(wanted: dict[str, torch.Size], imported: Imported) -> None:
    """Raises :class:`UserError` unless the tensors are those of the recipe's model."""
    found = {name: tensor.shape for name, tensor in imported.state.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            here, there = (str(list(shapes[name])) if name in shapes else "absent" for shapes in (found, wanted))
            raise UserError(f"{name} is {here}, by the recipe {there}", RECIPE, "the weights do not fit the recipe")


def _recipe(directory: Path, model: Model) -> Recipe:
    return Recipe(
        name=directory.resolve().name,
        description="imported from Hugging Face format; data and training are still to be chosen",
        model=model,
        data=Data(mixture="unset", sequence_length=min(1024, model.backbone.max_position)),
        train=Train(steps=1, global_batch=1, micro_batch=1),
        optimizer=Optimizer(lr=1e-4),
    )
