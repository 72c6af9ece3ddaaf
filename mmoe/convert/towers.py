"""An encoder's own directory: as transformers writes it, with a CLIP's or SigLIP's text tower too, and in OpenCLIP's
and timm's layouts, held against the recipe's table."""

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mmoe.checkpoint.tensors import Memory, Rows, Tensors, Together, View
from mmoe.convert.families import vision
from mmoe.convert.families.clip import CLIP, from_open_clip
from mmoe.convert.families.fields import check_same, read_config
from mmoe.convert.mapping import Table
from mmoe.convert.weights import DTYPES, Weights
from mmoe.errors import UserError
from mmoe.models.encoders.vit import resize_position
from mmoe.recipe.model import AnyEncoder, ConvNet, ConvNeXt, ViT

WHOLE = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
"""Models of pictures and texts, and the vision model in them."""
PREFIXES = ("", "vision_model.", "dinov2.", "dinov2_with_registers.", "convnext.")
"""In front of the tensors' names: alone, within a CLIP or SigLIP, and behind a head for classification."""
UNUSED = re.compile(
    r"(text_model|text_projection|visual_projection|classifier|head)\.|logit_scale$|logit_bias$|(.*\.)?position_ids$"
    r"|(vision_model\.)?head\.|(\w+\.)?embeddings\.mask_token$"
)
"""Of transformers' tensors, those that may be left aside where the recipe has no use for them."""
OPEN_CLIP_CONFIG = "open_clip_config.json"
PICTURES = {"name", "image_size", "drop_border", "mean", "std", "grid", "feature_layer", "feature_stages"}
"""Fields that no weight's shape hangs on, but for the positions'."""
FREE = PICTURES | {"final_norm", "pooling", "mask_token"}
"""And those whose weights are missed, or left aside, by name."""
NAMES = {"activation": "hidden_act", "mlp_width": "the MLP's width", "layer_scale": "layer_scale_init_value"}
NAMES |= {"query_value_bias": "the bias of query and value", "key_bias": "the bias of key"}
NAMES |= {"widths": "hidden_sizes"}


LARGEST_SIDE = 1 << 16
"""Pixels."""


class Taken(NamedTuple):
    """A part of a model out of a directory."""

    state: Tensors
    """Under our names in the whole model."""
    notes: list[str]


def read(directory: Path, encoder: AnyEncoder, path: str) -> Taken:
    """The weights of the recipe's ``encoder``, which stands at ``path`` there.

    Raises:
        UserError: another encoder, one that lacks a tensor or has one that nothing reads, or no encoder at all.
    """
    module = f"encoders.{encoder.name}"
    if not isinstance(encoder, ViT | ConvNeXt):
        raise UserError(f"{path}.type is {encoder.type!r}", str(directory), "no such encoder is published")
    tensors = Weights(directory, buffers=True)
    front = next((part for part in ("visual.trunk.", "") if f"{part}stem.0.weight" in tensors), None)
    if front is not None:
        return _timm(directory, tensors, front, encoder, path)
    front = next((part for part in ("visual.", "") if f"{part}conv1.weight" in tensors), None)
    if front is not None:
        return _open_clip(directory, tensors, front, encoder, path)
    config, where = vision_config(directory), str(directory / "config.json")
    theirs = vision.from_config(config, where, encoder.name)
    family = vision.FAMILIES[config["model_type"]]
    names = NAMES | {ours: there for there, ours in family.same.items()}
    free = FREE if encoder.pooling == "norm" else FREE | {"pooled_norm_eps"}
    check_same(_plain(theirs), _plain(encoder), path, where, free=free, names=names)
    if theirs.image_size > LARGEST_SIDE:
        what = f"image_size is {theirs.image_size}"
        raise UserError(what, where, "the weights do not fit the configuration")
    table = vision.table(_stored_for(theirs, encoder))
    names = [name for entry in table.entries for name in entry.theirs]
    front = max(PREFIXES, key=lambda part: sum(f"{part}{name}" in tensors for name in names))
    wanted = {name: Rows(f"{front}{name}") for name in names if f"{front}{name}" in tensors}
    aside = tensors.keys() - {rows.name for rows in wanted.values()}
    refuse_unknown(aside, UNUSED, directory)
    made = _read(table, View(tensors, wanted), directory)
    if isinstance(encoder, ViT) and encoder.position == "learned":
        rows = made.specs["position"].shape[0]
        if rows != encoder.class_token + (theirs.image_size // encoder.patch_size) ** 2:
            what = f"image_size is {theirs.image_size}, there are {rows} positions"
            raise UserError(what, where, "the weights do not fit the configuration")
    notes = _statistics(directory, encoder, module)
    return placed(made, encoder, module, notes + left_aside(module, directory, aside))


def vision_config(directory: Path) -> dict[str, Any]:
    """The ``config.json`` of an encoder's directory; of a CLIP or SigLIP with texts the vision model's part.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    config = read_config(directory)
    kind, inner = config.get("model_type"), config.get("vision_config")
    if isinstance(kind, str) and kind in WHOLE and isinstance(inner, dict):
        return {"model_type": WHOLE[kind], **inner}
    return config


def read_stored(directory: Path, tensors: Tensors, encoder: AnyEncoder, path: str) -> Taken:
    """The weights of the recipe's ``encoder``, which stands at ``path`` there, out of ``tensors`` of a larger model in
    ``directory``: a ``CLIPVisionModel`` without its configuration.

    Raises:
        UserError: another encoder, one that lacks a tensor or has one that nothing reads.
    """
    module = f"encoders.{encoder.name}"
    if not isinstance(encoder, ViT) or vision.family_of(encoder) is not CLIP:
        raise UserError(f"it is a CLIP, {path} is none by the recipe", str(directory), "give a part that fits")
    front = "vision_model." if any(name.startswith("vision_model.") for name in tensors) else ""
    table = vision.table(encoder, theirs=front)
    names = {name for entry in table.entries for name in entry.theirs if name in tensors}
    aside = tensors.keys() - names
    refuse_unknown(aside, UNUSED, directory)
    made = _read(table, View(tensors, {name: Rows(name) for name in names}), directory)
    notes = [f"{module}: nothing there tells of its heads, activation and epsilon: taken to be the recipe's"]
    return placed(made, encoder, module, notes + left_aside(module, directory, aside))


def _open_clip(directory: Path, tensors: Tensors, front: str, encoder: AnyEncoder, path: str) -> Taken:
    where, module = str(directory), f"encoders.{encoder.name}"
    if not isinstance(encoder, ViT) or vision.family_of(encoder) is not CLIP:
        raise UserError(f"it is a ViT of OpenCLIP, {path} is none by the recipe", where, "give a part that fits")
    notes = [f"{module}: no {OPEN_CLIP_CONFIG} there: heads, activation and epsilon are taken to be the recipe's"]
    if (directory / OPEN_CLIP_CONFIG).is_file():
        whole = _table(read_config(directory, OPEN_CLIP_CONFIG), "model_cfg", where)
        config, notes, where = _table(whole, "vision_cfg", where), [], str(directory / OPEN_CLIP_CONFIG)
        width, head, ratio = config.get("width"), config.get("head_width", 64), config.get("mlp_ratio", 4.0)
        if (
            type(width) is not int
            or type(head) is not int
            or not isinstance(ratio, int | float)
            or not all(0 < size < 2**20 for size in (width, head, ratio))
        ):
            what = f"width is {width!r}, head_width {head!r}, mlp_ratio {ratio!r}"
            raise UserError(what, where, "the recipe's encoder is a ViT: give one of OpenCLIP's")
        norms = config.get("norm_kwargs") or {}
        theirs = dataclasses.replace(
            _plain(encoder),
            **{key: config.get(key) for key in ("layers", "width", "patch_size")},
            heads=width // head,
            mlp_width=int(width * ratio),
            norm_eps=norms.get("eps", 1e-5) if isinstance(norms, dict) else norms,
            activation="quick_gelu" if whole.get("quick_gelu") else "gelu",
        )
        names = {"heads": "width / head_width", "norm_eps": "norm_kwargs.eps"}
        check_same(theirs, _plain(encoder), path, where, free=FREE, names=names)
    tower = View(tensors, {name.removeprefix(front): Rows(name) for name in tensors if name.startswith(front)})
    made = _read(vision.table(encoder), from_open_clip(tower, str(directory)), directory)
    aside = {name for name in tensors if not name.startswith(front) or name == f"{front}proj"}
    return placed(made, encoder, module, notes + left_aside(module, directory, aside))


def _timm(directory: Path, tensors: Tensors, front: str, encoder: AnyEncoder, path: str) -> Taken:
    where, module = str(directory), f"encoders.{encoder.name}"
    if not isinstance(encoder, ConvNeXt):
        raise UserError(f"it is a ConvNeXt of timm, {path} is none by the recipe", where, "give a part that fits")
    notes = [f"{module}: nothing there tells of its LayerNorms' epsilon: taken to be the recipe's"]
    if (directory / "config.json").is_file():
        config = read_config(directory)
        fields = config.get("model_args")
        if isinstance(fields, dict) and "norm_eps" in fields:
            notes = []
            if fields["norm_eps"] != encoder.norm_eps:
                what = f"norm_eps is {fields['norm_eps']!r}, {path}.norm_eps is {encoder.norm_eps!r} by the recipe"
                raise UserError(what, str(directory / "config.json"), "change the recipe: see --set")
    table = vision.table(encoder, layout="timm")
    names = [name for entry in table.entries for name in entry.theirs]
    wanted = {name: Rows(f"{front}{name}") for name in names if f"{front}{name}" in tensors}
    aside = tensors.keys() - {rows.name for rows in wanted.values()}
    inside = {name for name in aside if name.startswith(front)} if front else aside
    refuse_unknown(inside, re.compile(rf"{re.escape(front)}head\."), directory)
    made = _read(table, View(tensors, wanted), directory)
    return placed(made, encoder, module, notes + left_aside(module, directory, aside))


def _read(table: Table, tensors: Tensors, directory: Path) -> Tensors:
    check_dtypes(tensors, directory)
    return table.read(tensors, str(directory))


def placed(made: Tensors, encoder: AnyEncoder, module: str, notes: list[str]) -> Taken:
    """Our tensors under their names in the model, its positions for the recipe's size of pictures."""
    fitted: list[Tensors] = [View(made, {f"{module}.{name}": Rows(name) for name in made if name != "position"})]
    if isinstance(encoder, ViT) and encoder.position == "learned":
        there, here = made["position"], encoder.class_token + (encoder.image_size // encoder.patch_size) ** 2
        try:
            fitting = resize_position(there, encoder)
        except ValueError as error:
            raise UserError(f"{module}.position: {error}", "", "the weights do not fit the configuration") from None
        if len(there) != here:
            notes = [f"{module}: {len(there)} positions are resized to {here}, for {encoder.image_size} pixels", *notes]
        known = hashlib.sha256(repr((made.fingerprint(), here)).encode()).hexdigest()
        fitted.append(Memory({f"{module}.position": fitting}, known))
    return Taken(Together(fitted), notes)


def check_dtypes(tensors: Tensors, directory: Path) -> None:
    """Raises :class:`UserError` for a tensor that is no weight."""
    for name, spec in tensors.specs.items():
        if spec.dtype not in DTYPES.values():
            raise UserError(f"tensor {name} is {spec.dtype}", str(directory), "export it in fp32, bf16 or fp16")


def refuse_unknown(aside: Iterable[str], known: re.Pattern[str], directory: Path) -> None:
    """Raises :class:`UserError` for a tensor that is read nowhere and not :data:`known` to be of no use here."""
    unknown = sorted(name for name in aside if not known.match(name))
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        what = f"{directory} has unread tensor {unknown[0]}{more}"
        raise UserError(what, "", "the weights do not fit the configuration")


def left_aside(
    module: str, directory: Path, names: Iterable[str], group: Callable[[str], str] | None = None
) -> list[str]:
    """A note on tensors that are not read, counted by the module that they are of, or by what ``group`` makes of a
    name."""
    inner = (*PREFIXES[1:], "visual.")
    grouped = Counter(map(group or (lambda name: ".".join(name.split(".")[: 1 + name.startswith(inner)])), names))
    parts = [name if count == 1 else f"{name} ({count} tensors)" for name, count in sorted(grouped.items())]
    return [f"{module}: left aside in {directory}: {', '.join(parts)}"] if parts else []


def _statistics(directory: Path, encoder: ViT | ConvNeXt, module: str) -> list[str]:
    path = directory / "preprocessor_config.json"
    fields = read_config(directory, path.name) if path.is_file() else {}
    return statistics({key: fields.get(f"image_{key}") for key in ("mean", "std")}, encoder, module)


def statistics(found: Mapping[str, Any], encoder: AnyEncoder, module: str) -> list[str]:
    """A note for each of ``mean`` and ``std`` where a part's pixels are normalised in another way than the recipe's."""
    return [
        f"{module}: image_{key} is {value} there, {list(getattr(encoder, key))} by the recipe: pixels will differ"
        for key, value in found.items()
        if value is not None and value != list(getattr(encoder, key))
    ]


def _plain(encoder: ViT | ConvNeXt) -> Any:
    """With what stands for a default spelt out."""
    if isinstance(encoder, ViT):
        return dataclasses.replace(encoder, mlp_width=encoder.mlp_width or 4 * encoder.width)
    return encoder


def _stored_for(theirs: ViT | ConvNeXt, encoder: ViT | ConvNeXt) -> ViT | ConvNeXt:
    """The recipe's encoder for pictures of the size that the positions of ``theirs`` are for."""
    if isinstance(encoder, ViT) and isinstance(theirs, ViT):
        return dataclasses.replace(encoder, image_size=theirs.image_size, drop_border=theirs.drop_border)
    return encoder


def _table(fields: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    found = fields.get(key)
    if not isinstance(found, dict):
        raise UserError(f"{key} is {found!r}", where, "give a whole directory of OpenCLIP")
    return found


def layout_of(encoder: AnyEncoder) -> tuple[dict[str, Any], Table]:
    """The ``config.json`` and the tensors of an encoder's own directory: transformers', or timm's for a ConvNeXt that
    transformers has not. ``encoder`` is no ConvNet.

    Raises:
        UserError: neither has such an encoder; it names our field.
    """
    assert not isinstance(encoder, ConvNet)
    timm = (
        isinstance(encoder, ConvNeXt)
        and encoder.norm_eps != vision.from_config({"model_type": "convnext"}, "").norm_eps
    )
    if not timm:
        config = vision.to_config(encoder)
        # As they are published; transformers 5 reads them too, and saves them without.
        front = "vision_model." if config["model_type"] in WHOLE.values() else ""
        return config, vision.table(encoder, theirs=front)
    assert isinstance(encoder, ConvNeXt)
    sizes = {"depths": list(encoder.depths), "dims": list(encoder.widths), "patch_size": encoder.patch_size}
    config = {
        "architecture": "convnext_xxlarge",  # of timm's the one with an epsilon to choose
        "num_classes": 0,
        "num_features": encoder.widths[-1],
        "model_args": {**sizes, "norm_eps": encoder.norm_eps},
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, encoder.image_size, encoder.image_size],
            "mean": list(encoder.mean),
            "std": list(encoder.std),
        },
    }
    return config, vision.table(encoder, layout="timm")
