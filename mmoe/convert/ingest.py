"""From a Hugging Face directory to a checkpoint."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmoe.checkpoint.tensors import Rows, Spec, Tensors, Together, View, read_as
from mmoe.convert import processor, towers
from mmoe.convert.export import RECIPE
from mmoe.convert.families import cambrian, language, llava, llava_llama, longcat, multimodal
from mmoe.convert.families.fields import read_config, read_special
from mmoe.convert.weights import Weights
from mmoe.ending import one_line
from mmoe.errors import UserError
from mmoe.progress import progress
from mmoe.recipe.checks import model_problems, problems
from mmoe.recipe.load import dump_recipe, load_recipe
from mmoe.recipe.model import MTP, Model, ViT
from mmoe.recipe.schema import Data, Optimizer, Precision, Recipe, Train
from mmoe.recipe.tokens import OURS

FILE = 5 << 30
"""Bytes of a file of a checkpoint's tensors."""


class Imported(NamedTuple):
    """What a directory holds. ``tokenizer`` need not exist; ``notes`` names what was left out on purpose."""

    recipe: Recipe
    state: Tensors
    """Read when they are asked for."""
    tokenizer: Path
    notes: list[str]


def read_hf(directory: Path) -> Imported:
    """Read an export of ours, its ``language`` folder, or another ``LongcatFlashForCausalLM``, ``LlamaForCausalLM`` or
    ``LlavaForConditionalGeneration`` on one of these, or a ``LlavaLlamaForCausalLM`` with its encoder's folder, as
    Yi-VL. A released LLaVA or Cambrian-1 lacks the encoders: that is read by :func:`mmoe.convert.parts.from_parts`.

    A directory without our recipe gives one that names the model and leaves data and training to be chosen. Nothing in
    it is run, no pickle is read, and no file that an index of it names: its own ``*.safetensors`` are. They may be
    links, as in the hub's cache.

    Raises:
        UserError: a file is missing or unreadable, or tensors and configuration do not fit.
    """
    config = read_config(directory)
    if llava_llama.is_release(config):
        return _read_llava_llama(directory, config)
    tensors = Weights(directory)
    mtp = MTP() if any(longcat.MTP in name for name in tensors) else None
    fused = any(name.endswith("experts.gate_up_proj") for name in tensors)
    where = str(directory / "config.json")
    ours = load_recipe(directory / RECIPE) if (directory / RECIPE).exists() else None
    kind = config.get("model_type")
    if kind == cambrian.MODEL_TYPE:
        return _read_cambrian(directory, config, tensors, ours)
    if kind == "mmoe":
        model = dataclasses.replace(multimodal.from_config(config, where), mtp=mtp)
    elif kind == "llava":
        encoders = ours.model.encoders if ours else ()
        model = llava.from_config(config, where, *(encoder.name for encoder in encoders[:1]))
    else:
        backbone, moe = language.from_config(config, where)
        model = Model(backbone=backbone, moe=moe, mtp=mtp)
    special, untold = read_special(config, where)
    model = dataclasses.replace(model, special=special)
    _plausible(model, tensors, where)
    if kind == "llava":
        table = llava.table(model, llava.layout(tensors), fused=fused)
    else:
        table = (multimodal if kind == "mmoe" else language).table(model, fused=fused)
    unread = "gate and up projections of zero experts are not read: no computation uses them"
    notes = [unread] if model.moe and model.moe.zero_experts else []
    if ours:
        if ours.model.special == OURS:  # of an export from before recipes told of these
            ours = dataclasses.replace(ours, model=dataclasses.replace(ours.model, special=model.special))
        _plausible(ours.model, tensors, str(directory / RECIPE))  # its model is the one that is built
    else:
        ours = _recipe(directory, model, tensors)
        notes += untold
        if kind == "llava":
            ours, more = _as_processed(ours, directory)
            notes += more
    return Imported(ours, table.read(tensors, str(directory)), directory / "tokenizer.json", notes)


def _read_cambrian(directory: Path, config: dict[str, Any], tensors: Tensors, ours: Recipe | None) -> Imported:
    """An export with the encoders' own directories in it."""
    where = str(directory / "config.json")
    if ours is None or not (directory / cambrian.ENCODERS).is_dir():
        parts = [f"{module}={directory}" for module in ("connector", "language")]
        fix = f"mmoe convert from-parts RECIPE OUT --part {' '.join(parts)} encoders.NAME=DIR …"
        raise UserError("a released Cambrian-1 directory has no encoders in it", where, fix)
    model = ours.model
    for path, what, fix in cambrian.problems(model):
        raise UserError(f"its recipe is none of a Cambrian-1: {what}", f"{directory / RECIPE}, {path}", fix)
    own = {encoder.name: directory / cambrian.ENCODERS / encoder.name for encoder in model.encoders}
    apart = [(name, Weights(path)) for name, path in own.items()]
    every = [View(found, {f"{name}/{tensor}": Rows(tensor) for tensor in found}) for name, found in apart]
    _plausible(model, Together([tensors, *every]), str(directory / RECIPE))
    cambrian.check(config, model, where)
    backbone, _ = language.from_config({**config, "model_type": "llama"}, where)
    language.check_same_model(dataclasses.replace(model, backbone=backbone), model, where)
    states, notes = [cambrian.table(model).read(tensors, str(directory))], []
    for index, encoder in enumerate(model.encoders):
        taken = towers.read(own[encoder.name], encoder, f"model.encoders.{index}")
        states.append(taken.state)
        notes += taken.notes
    return Imported(ours, Together(states), directory / "tokenizer.json", notes)


def _read_llava_llama(directory: Path, config: dict[str, Any]) -> Imported:
    """A release with its encoder's folder in it, or an export in that layout."""
    where, folder = str(directory / "config.json"), llava_llama.tower(directory, config)
    tensors = Weights(directory, buffers=True)
    parts = llava_llama.divided(tensors)
    if folder is None or (parts.tower and config.get("unfreeze_mm_vision_tower")):
        encoder = f"{directory}" if parts.tower else "DIR"
        fix = f"--part connector={directory} language={directory} encoders.NAME={encoder}"
        what = f"nothing in it tells of the encoder, mm_vision_tower is {config.get('mm_vision_tower')!r}"
        if folder is not None:
            what = f"its encoder was trained (unfreeze_mm_vision_tower) and is not the one in {folder.name}"
        raise UserError(what, where, f"mmoe convert from-parts RECIPE OUT {fix}")
    if (told := directory / RECIPE).exists():
        recipe, notes = load_recipe(told), []
        for path, what, fix in llava_llama.problems(recipe.model):
            raise UserError(f"its recipe is none of a LLaVA or Yi-VL: {what}", f"{told}, {path}", fix)
    else:
        recipe, notes = _recipe_of_release(directory, config, folder, parts.read)
    model, apart = recipe.model, Weights(folder, buffers=True)
    every = Together([tensors, View(apart, {f"vision/{name}": Rows(name) for name in apart})])
    _plausible(model, every, str(told) if told.exists() else where)
    notes += llava_llama.check(config, model, where)
    backbone, _ = language.from_config({**config, "model_type": "llama"}, where)
    language.check_same_model(dataclasses.replace(model, backbone=backbone), model, where)
    towers.check_dtypes(parts.read, directory)
    state = llava_llama.table(model).read(parts.read, str(directory))
    (encoder,) = model.encoders
    taken = towers.read(folder, encoder, "model.encoders.0")
    notes += taken.notes + towers.left_aside("the rest", directory, parts.aside, llava_llama.group)
    return Imported(recipe, Together([state, taken.state]), directory / "tokenizer.json", notes)


def _recipe_of_release(
    directory: Path, config: dict[str, Any], folder: Path, tensors: Tensors
) -> tuple[Recipe, list[str]]:
    """A recipe of a published directory, with what its image processor does."""
    where, whose = str(directory / "config.json"), str(folder / "config.json")
    model = llava_llama.from_config(config, where, towers.vision_config(folder), whose)
    special, notes = read_special({**config, "model_type": "llama"}, where)
    special = dataclasses.replace(special, image=llava_llama.UNKNOWN)
    if special.pad == special.image:
        special = dataclasses.replace(special, pad=special.eos)
    notes.append(f"it has no token for pictures: model.special.image is {special.image}, <unk>, and pad {special.pad}")
    model = dataclasses.replace(model, special=special)
    recipe, more = _as_processed(_recipe(directory, model, tensors), folder)
    if config.get("image_aspect_ratio") == "pad":
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, fit="pad"))
        more += processor.our_border(recipe.model.encoders[0].mean)
    return recipe, notes + more


def _as_processed(recipe: Recipe, directory: Path) -> tuple[Recipe, list[str]]:
    """``recipe`` with what the directory's image processor does, and notes on what that leaves out."""
    found = processor.read_image_processor(directory)
    if found is None:
        return recipe, []
    statistics = {"mean": found.mean, "std": found.std}
    (encoder,) = recipe.model.encoders
    encoder = dataclasses.replace(encoder, **{key: value for key, value in statistics.items() if value})
    data = dataclasses.replace(recipe.data, fit=found.fit, interpolation=found.interpolation)
    model = dataclasses.replace(recipe.model, encoders=(encoder,))
    return dataclasses.replace(recipe, model=model, data=data), found.notes


def from_hf(directory: Path, out: Path) -> None:
    """Write the model in ``directory`` as the checkpoint OUT/checkpoints/step_00000000.

    It is there once it is whole; a conversion that was broken off goes on where it was.

    Raises:
        UserError: see :func:`read_hf`; or OUT is not empty, or the directory has no tokenizer.json.
    """
    check_room(out)
    imported = read_hf(directory)
    if not imported.tokenizer.is_file():
        raise UserError("no tokenizer.json", str(directory), "put the model's tokenizer there")
    write(imported, out, "from-hf")


def write(imported: Imported, out: Path, title: str) -> None:
    """Write a model as the checkpoint OUT/checkpoints/step_00000000, and print its notes; ``title`` of the progress.

    Raises:
        UserError: OUT is not empty, or the tensors are not those of the recipe's model.
    """
    from mmoe.checkpoint import layout, stream

    final, partial = layout.folder(out, 0), _partial(out)
    check_room(out)
    for note in imported.notes:
        print(one_line(note))
    with stream.alone(partial):
        check_room(out)  # again: another process may have made the checkpoint meanwhile
        _save(imported, partial, title)
        stream.publish(partial, final)
        layout.point_to(final)


def _partial(out: Path) -> Path:
    from mmoe.checkpoint import layout

    final = layout.folder(out, 0)
    return final.with_name(f".{final.name}.part")


def check_room(out: Path) -> None:
    """Raises :class:`UserError` where OUT holds anything but a conversion that was broken off."""
    partial = _partial(out)
    if out.is_dir() and set(out.iterdir()) <= {partial.parent} and set(partial.parent.glob("*")) <= {partial}:
        return
    if out.exists():
        raise UserError("is not an empty directory", str(out), "name another one")


def _save(imported: Imported, folder: Path, title: str) -> None:
    from mmoe.checkpoint import layout, shards, stream
    from mmoe.checkpoint.load import blank, weights
    from mmoe.parallel import state

    network = blank(imported.recipe)  # what its sizes make together is known before any of it takes memory
    wanted = weights(network)
    _fits({name: tensor.shape for name, tensor in wanted.items()}, imported)
    places = state.places(network)
    source = _Filled(
        imported.state, {name: Spec(place.tensor.shape, place.tensor.dtype) for name, place in places.items()}
    )
    plan = shards.plan(places, source, "state", FILE)
    with progress(title, sum(file.nbytes for file in plan.files)) as advance:
        written = stream.write(folder, plan.files, advance)
    shards.write_index(folder / "state", network, plan)
    (folder / "progress.json").write_text("{}\n")
    (folder / "recipe.toml").write_text(dump_recipe(imported.recipe))
    tokens = processor.read_tokens(imported.tokenizer, imported.recipe.model.special)
    (folder / "tokenizer.json").write_bytes(processor.without_bos(tokens))
    known = {path: {"bytes": size, "sha256": checksum} for path, (size, checksum) in written.items()}
    layout.write_manifest(folder, known, without=(stream.JOURNAL,))
    for path in (folder / "state", folder):
        layout.sync(path)


class _Filled(Tensors):
    """``found`` in the dtypes of ``specs``; what only training reads is not found and begins with zeros."""

    def __init__(self, found: Tensors, specs: dict[str, Spec]) -> None:
        self.found, self.specs = found, specs

    def read(self, name: str, start: int, out: Tensor) -> None:
        if name in self.found:
            read_as(self.found, name, start, out)
        else:
            out.zero_()

    def fingerprint(self) -> str | None:
        return self.found.fingerprint()


def _plausible(model: Model, tensors: Tensors, where: str) -> None:
    """Raises :class:`UserError` where the configuration cannot be that of ``tensors``, before any size in it is taken.

    Every layer has a tensor of its own, as has every expert unless they are fused, and every other size is a dimension
    of one.
    """
    for path, what, fix in model_problems(model):
        raise UserError(f"{path}: {what}", where, fix)
    moe, connector, backbone = model.moe, model.connector, model.backbone
    parts = [part for part in (backbone, moe, *model.encoders, connector) if part is not None]
    experts, everyone = (moe.experts, moe.experts + moe.zero_experts) if moe else (0, 0)
    layers = backbone.layers + (getattr(connector, "layers", 1) if connector else 0)
    layers += sum(encoder.layers if isinstance(encoder, ViT) else len(encoder.widths) for encoder in model.encoders)
    if not any(name.endswith("experts.gate_up_proj") for name in tensors):
        layers = max(layers, backbone.layers * experts)
    specs = tensors.specs.values()
    elements = sum(spec.numel for spec in specs)
    free = ("max_position", "image_size", "balance_groups", "grid")
    sizes = [value for part in parts for name, value in vars(part).items() if type(value) is int and name not in free]
    rows = backbone.layers * everyone
    if layers > len(tensors) or max(*sizes, rows) > elements:
        what = f"it tells of {layers} layers or experts and sizes up to {max(*sizes, rows)}"
        what = f"{what}, the {len(tensors)} tensors have {elements} numbers"
        raise UserError(what, where, "the weights do not fit the configuration")
    longest = max((size for spec in specs for size in spec.shape), default=0)
    widths = [width for encoder in model.encoders if not isinstance(encoder, ViT) for width in encoder.widths]
    places = [
        (encoder.image_size // encoder.patch_size) ** 2
        for encoder in model.encoders
        if isinstance(encoder, ViT) and encoder.position == "learned"
    ]
    if max([*widths, *places, everyone]) > longest:
        what = f"it tells of sizes up to {max([*widths, *places, everyone])}, no tensor's is above {longest}"
        raise UserError(what, where, "the weights do not fit the configuration")


def _fits(wanted: dict[str, torch.Size], imported: Imported) -> None:
    """Raises :class:`UserError` unless the tensors are those of the recipe's model."""
    found = {name: spec.shape for name, spec in imported.state.specs.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            here, there = (str(list(shapes[name])) if name in shapes else "absent" for shapes in (found, wanted))
            raise UserError(f"{name} is {here}, by the recipe {there}", RECIPE, "the weights do not fit the recipe")


def _recipe(directory: Path, model: Model, tensors: Tensors) -> Recipe:
    recipe = Recipe(
        name=directory.resolve().name,
        description="imported from Hugging Face format; data and training are still to be chosen",
        model=model,
        data=Data(mixture="unset", sequence_length=min(max(1024, 2 * model.image_tokens), model.backbone.max_position)),
        train=Train(steps=1, global_batch=1, micro_batch=1),
        optimizer=Optimizer(lr=1e-4),
    )
    for path, what, fix in problems(recipe):  # else what is written could not be loaded
        raise UserError(f"{path}: {what}", str(directory / "config.json"), fix)
    half = dataclasses.replace(recipe, precision=Precision(dtype="bf16"))
    stored = {spec.dtype for name, spec in tensors.specs.items() if ".router." not in name}
    # Training in bf16 asks for widths that not every model has.
    return half if stored == {torch.bfloat16} and not any(problems(half)) else recipe
