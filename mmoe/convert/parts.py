"""A recipe's model put together from published parts: encoders, a language model, a connector."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmoe.checkpoint.first import LANGUAGE, first_weights
from mmoe.checkpoint.load import blank, weights
from mmoe.checkpoint.tensors import COMPARED, Part, Rows, Spec, Tensors, Together, View
from mmoe.convert import towers
from mmoe.convert.families import cambrian, llava_llama
from mmoe.convert.families import language as languages
from mmoe.convert.families.fields import check_same, read_config
from mmoe.convert.ingest import Imported, check_room, read_hf, write
from mmoe.convert.towers import Taken, check_dtypes, left_aside, refuse_unknown
from mmoe.convert.weights import Weights
from mmoe.data.tokenizer import load_tokenizer
from mmoe.errors import UserError
from mmoe.models.count import vision_modules
from mmoe.parallel import state
from mmoe.recipe.model import SVA, Model
from mmoe.recipe.schema import Recipe

CONNECTOR = "connector"
EXPORTS = ("mmoe", "llava")
"""Kinds of directories that hold a whole model."""
UNUSED = re.compile(r".*\.rotary_emb\.inv_freq$|model\.mtp\.")
VOCABULARY = ("word_embeddings.weight", "output_layer.weight", "mtp.embed_tokens.weight")
"""Tensors with a row for each token."""


def from_parts(recipe: Recipe, out: Path, parts: Sequence[tuple[str, Path]], tokenizer: Path | None = None) -> None:
    """Write the model of ``recipe`` as the checkpoint OUT/checkpoints/step_00000000, for ``mmoe train … --from``.

    Modules without a part have the first weights that ``mmoe train`` of that recipe begins with. The checkpoint is
    there once it is whole; what was broken off goes on where it was.

    Args:
        recipe: one without stages, or a stage of one.
        out: an empty directory, or a new one.
        parts: modules ("language", "connector", "encoders.NAME") and the directories that they come from.
        tokenizer: a ``tokenizer.json``; the language part's, where it is None.

    Raises:
        UserError: a part that does not fit the recipe, that lacks a tensor or has one that nothing reads.
    """
    check_room(out)
    write(read_parts(recipe, parts, tokenizer), out, "from-parts")


def read_parts(recipe: Recipe, parts: Sequence[tuple[str, Path]], tokenizer: Path | None = None) -> Imported:
    """What :func:`from_parts` writes. Its tensors are read when they are asked for.

    Raises:
        UserError: see there.
    """
    given = _given(recipe.model, parts)
    places = state.places(network := blank(recipe))
    wanted = {name: Spec(tensor.shape, tensor.dtype) for name, tensor in weights(network).items()}
    found: list[Tensors] = []
    notes: list[str] = []
    for module, directory in given.items():
        taken = _take(recipe.model, module, directory)
        _check_shapes(taken.state, module, {n: spec for n, spec in wanted.items() if _of(n, module)}, directory)
        found.append(taken.state)
        notes += taken.notes
    rest = [name for name in _modules(recipe.model) if name not in given]
    found.append(first_weights(recipe, rest, {name: places[name] for name in wanted}))
    for module in rest:
        seed = f"seed {recipe.train.seed}"
        notes.append(f"{module}: no part is given: the first weights that `mmoe train` begins with ({seed})")
    made = Together(found, repr(sorted((module, str(directory)) for module, directory in given.items())))
    tokens = _tokenizer(recipe, given, tokenizer)
    return Imported(recipe, made, tokens, notes + (_foreign(tokens, recipe.model) if LANGUAGE in given else []))


def parse(given: Sequence[str]) -> list[tuple[str, Path]]:
    """What the command line says, ``MODULE=HF_DIR`` each.

    Raises:
        UserError: it says something else.
    """
    parts = []
    for part in given:
        module, _, directory = part.partition("=")
        if not directory:
            raise UserError(f"{part!r} is no part", "--part", "give MODULE=HF_DIR, as encoders.clip=CLIP_DIR")
        parts.append((module, Path(directory)))
    return parts


def _modules(model: Model) -> list[str]:
    return [*vision_modules(model), LANGUAGE]


def _of(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")


def _given(model: Model, parts: Sequence[tuple[str, Path]]) -> dict[str, Path]:
    given: dict[str, Path] = {}
    for module, directory in parts:
        if module not in _modules(model):
            raise UserError(
                f"the recipe has no module {module!r}", "--part", f"give one of {', '.join(_modules(model))}"
            )
        if module in given:
            raise UserError(f"{module} is given twice", "--part", "leave one of them out")
        if not directory.is_dir():
            raise UserError("no such directory", str(directory), "name what from_pretrained of transformers would read")
        given[module] = directory
    return given


def _tokenizer(recipe: Recipe, given: Mapping[str, Path], named: Path | None) -> Path:
    """The one that is ``named``, else the language part's, else the one that the recipe's data are read with."""
    theirs = given[LANGUAGE] / "tokenizer.json" if LANGUAGE in given else None
    data = Path(recipe.data.root) / recipe.data.tokenizer
    found = named or next((path for path in (theirs, data) if path is not None and path.is_file()), None)
    if found is None or not found.is_file():
        where = str(named or theirs or data)
        raise UserError("no tokenizer.json", where, "name one with --tokenizer")
    return found


def _foreign(tokenizer: Path, model: Model) -> list[str]:
    """A note where a language part comes with a tokenizer that training cannot read."""
    try:
        load_tokenizer(tokenizer, model.special, images=model.image_tokens > 0)
    except UserError as error:
        why = f"{error.what}: {error.fix}" if error.fix else error.what
        return [f"{LANGUAGE}: {tokenizer} is none that this recipe trains with ({why})"]
    return []


def _take(model: Model, module: str, directory: Path) -> Taken:
    config = read_config(directory) if (directory / "config.json").is_file() else {}
    kind = config.get("model_type")
    if llava_llama.is_release(config):
        return _of_llava_llama(model, module, directory, config)
    if kind in EXPORTS:
        return _of_export(model, module, directory)
    if kind == cambrian.MODEL_TYPE and not module.startswith("encoders."):
        return _of_cambrian(model, module, directory, config)
    if module == LANGUAGE:
        return _language(model, directory, Weights(directory, buffers=True), read_config(directory))
    if module != CONNECTOR:
        index = [f"encoders.{encoder.name}" for encoder in model.encoders].index(module)
        return towers.read(directory, model.encoders[index], f"model.encoders.{index}")
    kinds = ", ".join((*EXPORTS, cambrian.MODEL_TYPE, llava_llama.MODEL_TYPE))
    raise UserError(f"model_type is {kind!r}", str(directory / "config.json"), f"a connector comes of one of {kinds}")


def _of_export(model: Model, module: str, directory: Path) -> Taken:
    """A module of a whole model, of which we know the recipe's table."""
    imported, where = read_hf(directory), str(directory)
    theirs, notes = imported.recipe.model, [f"{module}: of {directory} nothing else is read"]
    notes += [f"{module}: {note}" for note in imported.notes]
    if module == LANGUAGE:
        languages.check_same_model(theirs, model, where)
        return _fitting(model, theirs, Part(imported.state, "language."), directory, notes)
    if module == CONNECTOR:
        assert model.connector is not None
        same_weights = set() if isinstance(model.connector, SVA) else {"grid"}
        check_same(theirs.connector, model.connector, "model.connector", where, free=same_weights)
        notes += _order([encoder.name for encoder in theirs.encoders], model, where)
        return Taken(Part(imported.state, "connector."), notes)
    index = [f"encoders.{encoder.name}" for encoder in model.encoders].index(module)
    ours, there = model.encoders[index], {encoder.name: encoder for encoder in theirs.encoders}
    found = there.get(ours.name) or (theirs.encoders[0] if len(theirs.encoders) == 1 else None)
    if found is None:
        raise UserError(f"it has no encoder {ours.name!r}", where, f"its encoders are {', '.join(there)}")
    check_same(found, ours, f"model.encoders.{index}", where, free=towers.PICTURES)
    notes += towers.statistics({key: list(getattr(found, key)) for key in ("mean", "std")}, ours, module)
    prefix = f"encoders.{found.name}."
    inside = {name.removeprefix(prefix): Rows(name) for name in imported.state if name.startswith(prefix)}
    return towers.placed(View(imported.state, inside), ours, module, notes)


def _order(theirs: Sequence[str], model: Model, where: str) -> list[str]:
    """A note where a connector's encoders have other names than the recipe's: its tensors tell one encoder from another
    by its place alone.

    Raises:
        UserError: they are the recipe's in another order.
    """
    ours = [encoder.name for encoder in model.encoders]
    told = f"made for the encoders {', '.join(theirs)}, the recipe's are {', '.join(ours)}"
    if sorted(theirs) == sorted(ours) and list(theirs) != ours:
        raise UserError(f"its connector is {told}", where, "give the recipe its encoders in that order")
    return [f"{CONNECTOR}: {told}: one has the place of the other"] if list(theirs) != ours else []


def _of_cambrian(model: Model, module: str, directory: Path, config: dict[str, Any]) -> Taken:
    where, tensors = str(directory / "config.json"), Weights(directory, buffers=True)
    of_connector = {name for name in tensors if cambrian.CONNECTOR.match(name)}
    if module == LANGUAGE:
        rest = View(tensors, {name: Rows(name) for name in tensors if name not in of_connector})
        return _language(model, directory, rest, {**config, "model_type": "llama"})
    cambrian.check(config, model, where)
    check_dtypes(own := View(tensors, {name: Rows(name) for name in tensors if name in of_connector}), directory)
    towers_there = [str(tower).removeprefix(f"{cambrian.ENCODERS}/") for tower in config["mm_vision_tower_aux_list"]]
    return Taken(cambrian.connector(model).read(own, str(directory)), _order(towers_there, model, where))


def _of_llava_llama(model: Model, module: str, directory: Path, config: dict[str, Any]) -> Taken:
    where, found = str(directory / "config.json"), llava_llama.divided(Weights(directory, buffers=True))
    if module == LANGUAGE:
        return _language(model, directory, found.language, {**config, "model_type": "llama"})
    if module == CONNECTOR:
        notes = [f"{module}: {note}" for note in llava_llama.check(config, model, where)]
        check_dtypes(found.connector, directory)
        return Taken(llava_llama.connector(model).read(found.connector, str(directory)), notes)
    folder = llava_llama.tower(directory, config)
    index = [f"encoders.{encoder.name}" for encoder in model.encoders].index(module)
    encoder, path = model.encoders[index], f"model.encoders.{index}"
    if found.tower and (folder is None or config.get("unfreeze_mm_vision_tower")):
        return towers.read_stored(directory, found.tower, encoder, path)
    if folder is None:
        what = f"it has no encoder, mm_vision_tower is {config.get('mm_vision_tower')!r}"
        raise UserError(what, where, f"give {module} the directory of that")
    return towers.read(folder, encoder, path)


def _language(model: Model, directory: Path, tensors: Tensors, config: dict[str, Any]) -> Taken:
    """The tensors of a directory with a language model alone."""
    where = str(directory / "config.json")
    backbone, moe = languages.from_config(config, where)
    theirs = Model(backbone=backbone, moe=moe, mtp=model.mtp)
    languages.check_same_model(theirs, model, where)
    table = languages.table(theirs, fused=any(name.endswith("experts.gate_up_proj") for name in tensors))
    read = {name for entry in table.entries for name in (*entry.theirs, *entry.tied)} | set(table.padding)
    aside = tensors.keys() - read
    refuse_unknown(aside, UNUSED, directory)
    check_dtypes(own := View(tensors, {name: Rows(name) for name in tensors if name in read}), directory)
    notes = left_aside(LANGUAGE, directory, aside, lambda name: re.sub(r"\d+", "*", name))
    if moe and moe.zero_experts:
        notes.append(f"{LANGUAGE}: gate and up projections of zero experts are not read: no computation uses them")
    return _fitting(model, theirs, table.read(own, str(directory)), directory, notes)


def _fitting(model: Model, theirs: Model, found: Tensors, directory: Path, notes: list[str]) -> Taken:
    """A language model's weights with as many rows of the embedding as the recipe has."""
    has, wants = theirs.backbone.vocab_size, model.backbone.vocab_size
    ends = [name for name in found if name.endswith(VOCABULARY)]
    for name in ends:
        if found.specs[name].shape[:1] != (has,):
            what = f"vocab_size is {has}, {name} is {list(found.specs[name].shape)}"
            raise UserError(what, str(directory), "the weights do not fit the configuration")
    if theirs.backbone.max_position < model.backbone.max_position:
        what = f"{theirs.backbone.max_position} positions, the recipe's has {model.backbone.max_position}"
        notes.append(f"{LANGUAGE}: its model was made for {what}")
    if has == wants:
        return Taken(found, notes)
    why = f"{has} tokens are padded to model.backbone.vocab_size = {wants}"
    return Taken(_Padded(found, ends, wants), [f"{LANGUAGE}: {why}; each new row is the mean of the others", *notes])


class _Padded(Tensors):
    """``found`` with the tensors called ``names`` [rows, d] made up to ``rows`` rows by their mean row."""

    def __init__(self, found: Tensors, names: Sequence[str], rows: int) -> None:
        self.found = found
        self.means: dict[str, Tensor | None] = dict.fromkeys(names)
        padded = {n: Spec(torch.Size([rows, *found.specs[n].shape[1:]]), found.specs[n].dtype) for n in names}
        self.specs = {**found.specs, **padded}
        source = found.fingerprint()
        self.known = source and hashlib.sha256(repr((source, rows)).encode()).hexdigest()

    def read(self, name: str, start: int, out: Tensor) -> None:
        there = max(0, min(out.numel(), self.found.specs[name].numel - start))
        if there:
            self.found.read(name, start, out[:there])
        if there < out.numel():
            mean = self._mean(name)
            out[there:] = mean[(start + torch.arange(there, out.numel())) % mean.numel()]

    def _mean(self, name: str) -> Tensor:
        """Of all rows, [d]; summed in fp64."""
        known = self.means[name]
        if known is None:
            spec = self.found.specs[name]
            count, width = spec.shape
            most, total = max(1, COMPARED // width), torch.zeros(width, dtype=torch.float64)
            for first in range(0, count, most):
                rows = torch.empty(min(most, count - first), width, dtype=spec.dtype)
                self.found.read(name, first * width, rows.view(-1))
                total += rows.double().sum(0)
            known = self.means[name] = (total / count).to(spec.dtype)
        return known

    def fingerprint(self) -> str | None:
        return self.known


def _check_shapes(found: Tensors, module: str, wanted: Mapping[str, Spec], directory: Path) -> None:
    """Raises :class:`UserError` unless the tensors of a part are those of the recipe's module."""
    for name in sorted(found.keys() | wanted.keys()):
        here, there = (str(list(side[name].shape)) if name in side else "absent" for side in (wanted, found.specs))
        if here != there:
            what = f"{name} is {there}, by the recipe {here}"
            raise UserError(what, str(directory), f"give a part that fits {module}, or change the recipe: see --set")
