"""What the types cannot say: values that are impossible alone or together, as `(key, what, fix)`."""

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmoe.recipe.model import (
    SVA,
    AnyConnector,
    AnyEncoder,
    Backbone,
    ConvNet,
    ConvNeXt,
    Llama,
    Longcat,
    Model,
    MoE,
    ViT,
)
from mmoe.recipe.schema import Recipe, Train

_MAY_BE_NEGATIVE = {"feature_layer", "feature_stages"}
_MAY_BE_ZERO = {
    "balance_coefficient",
    "bias_derivative_gain",
    "bias_integral_gain",
    "bias_rate",
    "bias_rate_min",
    "bos",
    "clip_grad",
    "eos",
    "hidden_z_coefficient",
    "image",
    "keep_every",
    "keep_last",
    "mean",
    "min_lr",
    "pad",
    "registers",
    "router_init_std",
    "seed",
    "start",
    "warmup_steps",
    "weight_decay",
    "zero_experts",
}
_FRACTION = {"betas"}
MOST_STAGES = 30
"""Of a ConvNet: no image has 2**30 pixels a side."""
WIDTH_UNIT = 8
"""Of a ConvNet's widths."""
_MODULE_NAME = re.compile(r"[A-Za-z0-9_-]+")

Problem = tuple[str, str, str]


def stride(encoder: AnyEncoder) -> int:
    """Pixels of the image a side for one cell of the coarsest map that the encoder makes."""
    match encoder:
        case ViT():
            return encoder.patch_size
        case ConvNeXt():
            return encoder.patch_size * 2 ** (len(encoder.widths) - 1)
        case ConvNet():
            return 2 ** len(encoder.widths)


def encoder_grid(encoder: AnyEncoder) -> int:
    """Side of the square map of an encoder's features: what the recipe resizes it to, or as it comes."""
    if encoder.grid is not None:
        return encoder.grid
    if isinstance(encoder, ConvNeXt):
        last = encoder.feature_stages[-1] % max(1, len(encoder.widths))
        return encoder.image_size // (encoder.patch_size * 2**last)
    return encoder.image_size // stride(encoder)


def is_frozen(encoder: AnyEncoder, train: Train) -> bool:
    """Whether ``train.frozen`` names all of an encoder."""
    return any(name in ("encoders", f"encoders.{encoder.name}") for name in train.frozen)


def row_unit(recipe: Recipe) -> int:
    """Numbers in the 16 bytes that a grouped GEMM reads at a time."""
    return 4 if recipe.precision.dtype == "fp32" else 8


def problems(recipe: Recipe, *, staged: bool = False) -> Iterator[Problem]:
    """Everything wrong with the values of a well-typed recipe, in the order of its tables; ``staged``: of one that is
    not trained itself, but its stages."""
    yield from ranges(recipe)
    name = recipe.name
    if not name.isprintable() or name in ("", "..") or Path(name).name != name:
        yield "name", f"{name!r} is no name of a folder", "a run's folder is called so: leave out slashes"
    yield from model_problems(recipe.model)
    unit, moe = row_unit(recipe), recipe.model.moe
    sizes = (
        {"backbone.hidden_size": recipe.model.backbone.hidden_size, "moe.expert_hidden_size": moe.expert_hidden_size}
        if moe
        else {}
    )
    for name, size in sizes.items():
        if size % unit:
            what = f"{size} is not a multiple of {unit}"
            yield f"model.{name}", what, "the grouped GEMM reads rows of 16 bytes at a time: round it"
    data, train, optimizer, backbone = recipe.data, recipe.train, recipe.optimizer, recipe.model.backbone
    if data.sequence_length > backbone.max_position:
        yield "data.sequence_length", f"{data.sequence_length} is above model.backbone.max_position", "raise that one"
    if recipe.model.image_tokens + 2 > data.sequence_length:
        yield "data.sequence_length", "one image's tokens do not fit", "raise it, or lower model.connector.grid"
    if data.features and not staged and not any(is_frozen(e, train) for e in recipe.model.encoders):
        what = "no encoder is frozen: features from a cache do not learn"
        yield "data.features", what, 'name one in train.frozen, as in ["encoders"], or leave the key out'
    if isinstance(recipe.model.connector, SVA) and recipe.model.connector.mask_padding and data.fit != "pad":
        what = f"images are not padded with data.fit = {data.fit!r}: cells of the picture would be masked"
        yield "model.connector.mask_padding", what, 'set data.fit = "pad", or leave the key out'
    if train.global_batch % train.micro_batch:
        what = f"{train.global_batch} is not a multiple of train.micro_batch = {train.micro_batch}"
        yield "train.global_batch", what, "change one of them"
    checkpoint = recipe.checkpoint
    if checkpoint.keep_every % checkpoint.every:
        what = f"{checkpoint.keep_every} is not a multiple of checkpoint.every = {checkpoint.every}"
        yield "checkpoint.keep_every", what, "change one of them"
    if checkpoint.keep_every and not checkpoint.keep_last:
        yield "checkpoint.keep_every", "checkpoint.keep_last = 0 keeps all", "set it, or leave keep_every out"
    if optimizer.warmup_steps > train.steps:
        yield "optimizer.warmup_steps", f"{optimizer.warmup_steps} is above train.steps = {train.steps}", "lower it"
    if optimizer.min_lr > optimizer.lr:
        yield "optimizer.min_lr", f"{optimizer.min_lr:g} is above optimizer.lr = {optimizer.lr:g}", "lower it"


def hand_over_problems(before: Model, after: Model) -> Iterator[Problem]:
    """Why the weights of ``before``, a stage's model, are not those of ``after``, the next one's: all that may change
    is the size of images and of feature maps, as far as no weight's shape hangs on it."""
    for name in ("backbone", "special", "moe", "mtp"):
        if getattr(before, name) != getattr(after, name):
            yield f"model.{name}", "it differs from the stage before", "stages train one and the same model"
    plain = [[dataclasses.replace(e, image_size=1, grid=None) for e in model.encoders] for model in (before, after)]
    if plain[0] != plain[1]:
        what = "they differ from the stage before in more than image_size and grid"
        yield "model.encoders", what, "stages train one and the same model"
        return
    old, new = before.connector, after.connector
    if not _same_weights(old, new):
        yield "model.connector", "it differs from the stage before", "stages train one and the same model"
        return
    if isinstance(new, SVA):
        sides = (new.grid, *new.sides)
        for index, (first, second) in enumerate(zip(before.encoders, after.encoders, strict=True)):
            cells, had = ([encoder_grid(encoder) // side for side in sides] for encoder in (second, first))
            if cells != had:
                what = f"{encoder_grid(second)} cells a side give each query {cells[0]}² of them, not {had[0]}²"
                fix = f"keep model.encoders.{index}.grid = {encoder_grid(first)}: features are resized to that"
                yield f"model.encoders.{index}.grid", what, fix


def _same_weights(old: AnyConnector | None, new: AnyConnector | None) -> bool:
    """Whether two connectors differ in nothing that has weights: tokens of another square, but for SVA's windows."""
    if old == new or old is None or new is None or isinstance(old, SVA):
        return old == new
    return dataclasses.replace(old, grid=1) == dataclasses.replace(new, grid=1)


def ranges(value: Any, path: str = "", name: str = "") -> Iterator[Problem]:
    """Sizes and rates are positive and finite unless listed above."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from ranges(getattr(value, field.name), f"{path}.{field.name}".lstrip("."), field.name)
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from ranges(item, f"{path}.{index}", name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            yield path, f"{value} is not a finite number", "give a finite one"
        elif name in _FRACTION and not 0 <= value < 1:
            yield path, f"{value} is not in [0, 1)", "give a fraction below 1"
        elif name in _MAY_BE_ZERO and value < 0:
            yield path, f"{value} is negative", "give 0 or more"
        elif name not in _MAY_BE_ZERO | _MAY_BE_NEGATIVE | _FRACTION and value <= 0:
            yield path, f"{value} is not positive", "give a value above 0"


def model_problems(model: Model) -> Iterator[Problem]:
    """Everything wrong with a well-typed model whose values are in their ranges."""
    backbone, connector = model.backbone, model.connector
    if backbone.vocab_size < 5:
        yield "model.backbone.vocab_size", "smaller than the special tokens and one word", "give at least 5"
    yield from _special(model)
    match backbone:
        case Longcat():
            yield from _longcat(backbone, model.moe)
        case Llama():
            yield from _llama(backbone, model)
    if model.encoders and connector is None:
        yield "model.encoders", "encoders without a connector", "add a [model.connector] table"
    if connector is not None and not model.encoders:
        yield "model.connector", "a connector without encoders", "add [[model.encoders]] or drop the connector"
    if isinstance(connector, SVA):
        yield from _sva(connector, backbone)
    names: set[str] = set()
    for index, encoder in enumerate(model.encoders):
        path = f"model.encoders.{index}"
        if encoder.name in names:
            yield f"{path}.name", f"{encoder.name!r} names two encoders", "give each its own name"
        if not _MODULE_NAME.fullmatch(encoder.name):
            what = f"{encoder.name!r} is no name of a module"
            yield f"{path}.name", what, "its weights and its folder are called so: take letters, digits, _ and -"
        names.add(encoder.name)
        found = list(_encoder(path, encoder))
        yield from found
        if not found and isinstance(connector, SVA):
            for key, side in (("grid", connector.grid), *(("groups", side) for side in connector.groups)):
                if encoder_grid(encoder) % side:
                    what = f"{side} does not divide the grid of encoder {encoder.name!r}, {encoder_grid(encoder)}"
                    fix = f"give a divisor, or set {path}.grid: its features are resized to that"
                    yield f"model.connector.{key}", what, fix


def _special(model: Model) -> Iterator[Problem]:
    special, size = dataclasses.asdict(model.special), model.backbone.vocab_size
    image = special.pop("image") if model.connector is not None else None
    for name, number in {**special, "image": image}.items():
        if number is not None and number >= size:
            what = f"{number} is none of model.backbone.vocab_size = {size} tokens"
            yield f"model.special.{name}", what, "lower it, or raise the size: new rows are the mean of the others"
    if image in special.values():
        name = next(name for name, number in special.items() if number == image)
        yield "model.special.image", f"{image} is also {name}", "images need a token of their own"


def _longcat(backbone: Longcat, moe: MoE | None) -> Iterator[Problem]:
    if backbone.qk_rope_head_dim % 2:
        yield "model.backbone.qk_rope_head_dim", f"{backbone.qk_rope_head_dim} is odd", "rotary pairs need an even one"
    if moe is None:
        yield "model", "missing key 'model.moe'", "a LongCat backbone has experts: add a [model.moe] table"
        return
    everyone = moe.experts + moe.zero_experts
    if moe.top_k > everyone:
        yield "model.moe.top_k", f"{moe.top_k} is above experts + zero_experts = {everyone}", "lower it"
    if moe.active_experts > min(moe.top_k, moe.experts):
        limit = f"min(top_k, experts) = {min(moe.top_k, moe.experts)}"
        yield "model.moe.active_experts", f"{moe.active_experts:g} is above {limit}", "lower it"
    if moe.active_experts < moe.top_k - moe.zero_experts:
        forced = moe.top_k - moe.zero_experts
        what = f"top_k - zero_experts leaves every token at least {forced} FFN experts, not {moe.active_experts:g}"
        yield "model.moe.active_experts", what, "raise it, or raise zero_experts"
    if moe.balance_coefficient and moe.zero_experts and moe.active_experts >= moe.top_k:
        what = f"{moe.active_experts:g} leaves nothing to the zero experts' share of the balance loss"
        yield "model.moe.active_experts", what, "give less than top_k, or set balance_coefficient = 0"
    if moe.bias_rate_min is not None and moe.bias_rate_min > moe.bias_rate:
        what = f"{moe.bias_rate_min:g} is above model.moe.bias_rate = {moe.bias_rate:g}"
        yield "model.moe.bias_rate_min", what, "lower it"
    if moe.experts % moe.balance_groups:
        yield "model.moe.balance_groups", f"{moe.balance_groups} does not divide experts = {moe.experts}", "change one"


def _llama(backbone: Llama, model: Model) -> Iterator[Problem]:
    if model.moe is not None:
        yield "model.moe", "a Llama backbone has no experts", "leave the table out, or use a LongCat backbone"
    if model.mtp is not None:
        what = "multi-token prediction stands on a LongCat backbone"
        yield "model.mtp", what, "leave the table out, or use a LongCat backbone"
    if backbone.heads % backbone.kv_heads:
        what = f"{backbone.kv_heads} does not divide heads = {backbone.heads}"
        yield "model.backbone.kv_heads", what, "every head of keys and values serves as many heads of queries"
    if backbone.head_dim % 2:
        yield "model.backbone.head_dim", f"{backbone.head_dim} is odd", "rotary pairs need an even one"


def _sva(connector: SVA, backbone: Backbone) -> Iterator[Problem]:
    if connector.width % connector.heads:
        what = f"{connector.width} is not a multiple of heads = {connector.heads}"
        yield "model.connector.width", what, "change one of them"
    inside = connector.inside
    if inside is not None and inside.start + (inside.layers - 1) * inside.stride >= backbone.layers:
        last = inside.start + (inside.layers - 1) * inside.stride
        what = f"the last of {inside.layers} stands behind layer {last}, the model has {backbone.layers}"
        yield "model.connector.inside.layers", what, "lower it, or the stride"


def _encoder(path: str, encoder: AnyEncoder) -> Iterator[Problem]:
    match encoder:
        case ViT():
            yield from _vit(path, encoder)
        case ConvNeXt():
            if len(encoder.depths) != len(encoder.widths) or not encoder.widths:
                what = f"{len(encoder.depths)} depths for {len(encoder.widths)} widths"
                yield f"{path}.depths", what, "give one of each for every stage"
                return
            stages = range(-len(encoder.widths), len(encoder.widths))
            if not encoder.feature_stages or any(stage not in stages for stage in encoder.feature_stages):
                what = f"{list(encoder.feature_stages)} names no stages of {len(encoder.widths)}"
                yield f"{path}.feature_stages", what, "give stages that are there"
                return
            if len(encoder.feature_stages) > 1 and encoder.grid is None:
                what = "maps of several stages differ in size"
                yield f"{path}.grid", what, "give the side that they are all resized to"
        case ConvNet():
            odd = [width for width in encoder.widths if width % WIDTH_UNIT]
            if odd:
                what = f"{odd[0]} is not a multiple of {WIDTH_UNIT}"
                yield f"{path}.widths", what, "its GroupNorms have so many groups"
            if not encoder.widths:
                yield f"{path}.widths", "a ConvNet without stages", "give one width a stage"
    if not isinstance(encoder, ViT) and len(encoder.widths) > MOST_STAGES:
        yield f"{path}.widths", f"{len(encoder.widths)} stages, each of which halves the image", "give fewer"
    elif isinstance(encoder, ViT) and encoder.drop_border:
        if encoder.image_size < encoder.patch_size:
            what = f"{encoder.image_size} is less than patch_size = {encoder.patch_size}"
            yield f"{path}.image_size", what, "an image has one patch or more"
    elif encoder.image_size % stride(encoder):
        what = f"{encoder.image_size} is not a multiple of the encoder's stride {stride(encoder)}"
        yield f"{path}.image_size", what, f"use a multiple of {stride(encoder)}"


def _vit(path: str, encoder: ViT) -> Iterator[Problem]:
    if encoder.width % encoder.heads:
        yield f"{path}.width", f"{encoder.width} is not a multiple of heads = {encoder.heads}", "change one of them"
    elif encoder.position == "rope" and encoder.width // encoder.heads % 4:
        what = f"heads of {encoder.width // encoder.heads} are no multiple of 4"
        yield f"{path}.width", what, "rotary pairs of two axes need one"
    if not -encoder.layers <= encoder.feature_layer < encoder.layers:
        what = f"{encoder.feature_layer} names none of {encoder.layers} layers"
        yield f"{path}.feature_layer", what, "-1 is the last, -2 the one before"
    if encoder.final_norm and encoder.pooling == "norm":
        what = "the last LayerNorm is either the features' or the pooled token's"
        yield f"{path}.pooling", what, "set final_norm = false, as CLIP has it"
