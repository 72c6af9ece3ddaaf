"""Vision encoders as transformers stores them: CLIP, SigLIP, DINOv2 (with and without registers), DINOv3, ConvNeXt.

The names are those on disk, which is how models are published; transformers 5 renames some of them while it loads.
"""

import re
from typing import Any, Literal

import torch

from mmoe.convert.families.clip import CLIP, SIGLIP
from mmoe.convert.families.convnext import CONVNEXT, TIMM
from mmoe.convert.families.dino import DINOV2, DINOV2_REGISTERS, DINOV3
from mmoe.convert.families.encoder import Family, Names
from mmoe.convert.mapping import Entry, Table
from mmoe.errors import UserError
from mmoe.models.encoders import build_encoder
from mmoe.recipe.load import typed
from mmoe.recipe.model import ConvNeXt, ViT

FAMILIES = {family.model_type: family for family in (CLIP, SIGLIP, DINOV2, DINOV2_REGISTERS, DINOV3, CONVNEXT)}


def from_config(config: Any, where: str, name: str = "vision") -> ViT | ConvNeXt:
    """The encoder of an encoder's ``config.json``, or of the ``vision_config`` in that of a larger model. Its features
    are those of the last layer or stage, its pixels' statistics those that the family is published with: replace
    ``feature_layer``, ``feature_stages``, ``mean`` and ``std`` where others are wanted.

    Raises:
        UserError: another kind of model, or a variant that is not supported; it names the field.
    """
    kind = config.get("model_type") if isinstance(config, dict) else config
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"model_type is {kind!r}", where, f"give one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    fields = {**family.defaults, **family.only, **config}
    for key, supported in family.only.items():
        if fields[key] != supported:
            raise UserError(f"{key} is {fields[key]!r}", where, f"only {supported!r} is supported")
    ours = {key: next(iter(values)) for key, values in family.options.items()}
    ours |= {"name": name, "type": "vit" if family.table is ViT else "convnext"}
    ours |= {key: list(values) for key, values in family.statistics.items()}
    ours |= {key: fields[theirs] for theirs, key in family.same.items()} | family.read(fields, where)
    made = typed(family.table, ours, where)
    for key, what in _misfits(made, family):
        theirs = next((theirs for theirs, mine in family.same.items() if mine == key), key)
        raise UserError(f"{theirs} is {what}", where, f"{family.architecture}s with that are not supported")
    return made


def to_config(config: ViT | ConvNeXt) -> dict[str, Any]:
    """The ``config.json`` of transformers' encoder that computes the same.

    Raises:
        UserError: there is none; it names our field.
    """
    family = family_of(config)
    theirs = {key: getattr(config, ours) for key, ours in family.same.items()} | family.write(config)
    lists = {key: list(value) if isinstance(value, tuple) else value for key, value in theirs.items()}
    return {"architectures": [family.architecture], "model_type": family.model_type, **family.only, **lists}


def table(
    config: ViT | ConvNeXt,
    *,
    ours: str = "",
    theirs: str = "",
    layout: Literal["transformers", "timm"] = "transformers",
) -> Table:
    """Every tensor of the encoder; ``ours`` and ``theirs`` go in front of the names (theirs is ``vision_model.`` for
    CLIP and SigLIP as they are published). ``layout`` timm is for ConvNeXt.

    Raises:
        UserError: see :func:`to_config`; or sizes that do not divide.
    """
    names, dims = TIMM, {}
    if layout == "transformers":
        family = family_of(config)
        names, dims = family.names(config), family.dims
    elif not isinstance(config, ConvNeXt):
        raise ValueError(f"timm's layout of a {config.type} is not known")
    with torch.device("meta"):
        tensors = build_encoder(config).state_dict()
    entries: list[Entry] = []
    for name, tensor in tensors.items():
        shapes = None
        if name in dims:  # tokens or positions [rows, width], theirs [width] or [1, rows, width]
            rows = tuple(tensor.shape)
            shapes = (rows, rows[1:] if dims[name] == 1 else (1, *rows))
        entries.append(Entry(name, _their_names(name, names), shapes=shapes))
    return Table(entries).prefixed(ours=ours, theirs=theirs)


def family_of(config: ViT | ConvNeXt) -> Family:
    """The one of transformers' encoders that computes what ``config`` says.

    Raises:
        UserError: there is none. It names the fields in which the nearest one differs.
    """
    misfits = {f.model_type: _misfits(config, f) for f in FAMILIES.values() if isinstance(config, f.table)}
    if not misfits:
        raise UserError(f"transformers has no {config.type}", f"model.encoders, {config.name}", "export it with mmoe")
    nearest = min(misfits, key=lambda kind: len(misfits[kind]))
    if misfits[nearest]:
        what = ", ".join(f"{key} = {value}" for key, value in misfits[nearest])
        fix = f"its {FAMILIES[nearest].architecture}, the nearest one, has none with that"
        raise UserError(f"transformers has no encoder with {what}", f"model.encoders, {config.name}", fix)
    return FAMILIES[nearest]


def _misfits(config: ViT | ConvNeXt, family: Family) -> list[tuple[str, str]]:
    """The fields of ``config`` that the family has not, with their values."""
    found = {key: getattr(config, key) for key in family.options}
    misfits = [(key, repr(value)) for key, value in found.items() if value not in family.options[key]]
    if isinstance(config, ViT) and not config.final_norm and config.pooling == "none":
        misfits.append(("pooling", "'none' without final_norm"))
    return misfits


def _their_names(name: str, names: Names) -> tuple[str, ...]:
    """Theirs for one of our tensors: by its whole name, or by its module's."""
    pattern, numbers = re.sub(r"\d+", "#", name), re.findall(r"\d+", name)
    module, _, leaf = pattern.rpartition(".")
    found = names.get(pattern)
    parts = found if found is not None else names[module]
    parts = (parts,) if isinstance(parts, str) else parts
    return tuple(part.format(*numbers) + ("" if found is not None else f".{leaf}") for part in parts)
