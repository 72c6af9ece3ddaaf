"""What the types cannot say: values that are impossible alone or together, as `(key, what, fix)`."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmoe.recipe.schema import Encoder, Model, Recipe

_MAY_BE_ZERO = {
    "balance_coefficient",
    "bias_derivative_gain",
    "bias_integral_gain",
    "bias_rate",
    "bias_rate_min",
    "clip_grad",
    "hidden_z_coefficient",
    "keep_every",
    "keep_last",
    "min_lr",
    "router_init_std",
    "seed",
    "warmup_steps",
    "weight_decay",
    "zero_experts",
}
_FRACTION = {"betas"}
MOST_STAGES = 30
"""Of a ConvNet: no image has 2**30 pixels a side."""
WIDTH_UNIT = 8
"""Of a ConvNet's widths."""

Problem = tuple[str, str, str]


def encoder_grid(encoder: Encoder) -> int:
    """Side of the square feature map of one encoder: a ViT's patches; a ConvNet halves the image once a width."""
    return encoder.image_size // (encoder.patch_size if encoder.type == "vit" else 2 ** len(encoder.widths))


def row_unit(recipe: Recipe) -> int:
    """Numbers in the 16 bytes that a grouped GEMM reads at a time."""
    return 4 if recipe.precision.dtype == "fp32" else 8


def problems(recipe: Recipe) -> Iterator[Problem]:
    """Everything wrong with the values of a well-typed recipe, in the order of its tables."""
    yield from ranges(recipe)
    name = recipe.name
    if not name.isprintable() or name in ("", "..") or Path(name).name != name:
        yield "name", f"{name!r} is no name of a folder", "a run's folder is called so: leave out slashes"
    yield from model_problems(recipe.model)
    unit = row_unit(recipe)
    sizes = {"backbone.hidden_size": recipe.model.backbone.hidden_size}
    for name, size in {**sizes, "moe.expert_hidden_size": recipe.model.moe.expert_hidden_size}.items():
        if size % unit:
            what = f"{size} is not a multiple of {unit}"
            yield f"model.{name}", what, "the grouped GEMM reads rows of 16 bytes at a time: round it"
    data, train, optimizer, backbone = recipe.data, recipe.train, recipe.optimizer, recipe.model.backbone
    if data.sequence_length > backbone.max_position:
        yield "data.sequence_length", f"{data.sequence_length} is above model.backbone.max_position", "raise that one"
    if recipe.model.connector and recipe.model.connector.grid**2 + 2 > data.sequence_length:
        yield "data.sequence_length", "one image's tokens do not fit", "raise it, or lower model.connector.grid"
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
        elif name not in _MAY_BE_ZERO | _FRACTION and value <= 0:
            yield path, f"{value} is not positive", "give a value above 0"


def model_problems(model: Model) -> Iterator[Problem]:
    """Everything wrong with a well-typed model whose values are in their ranges."""
    moe, backbone, connector = model.moe, model.backbone, model.connector
    everyone = moe.experts + moe.zero_experts
    if backbone.vocab_size < 5:
        yield "model.backbone.vocab_size", "smaller than the special tokens and one word", "give at least 5"
    if backbone.qk_rope_head_dim % 2:
        yield "model.backbone.qk_rope_head_dim", f"{backbone.qk_rope_head_dim} is odd", "rotary pairs need an even one"
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
    if model.encoders and connector is None:
        yield "model.encoders", "encoders without a connector", "add a [model.connector] table"
    if connector is not None and not model.encoders:
        yield "model.connector", "a connector without encoders", "add [[model.encoders]] or drop the connector"
    if connector is not None and connector.width % connector.heads:
        what = f"{connector.width} is not a multiple of heads = {connector.heads}"
        yield "model.connector.width", what, "change one of them"
    yield from _encoders(model)


def _encoders(model: Model) -> Iterator[Problem]:
    first = model.encoders[0] if model.encoders else None
    names: set[str] = set()
    for index, encoder in enumerate(model.encoders):
        path = f"model.encoders.{index}"
        if encoder.name in names:
            yield f"{path}.name", f"{encoder.name!r} names two encoders", "give each its own name"
        names.add(encoder.name)
        if first is not None and encoder.image_size != first.image_size:
            what = f"{encoder.image_size} differs from the first encoder's {first.image_size}"
            yield f"{path}.image_size", what, "every encoder sees the same pixels: use one size"
        if encoder.type == "vit" and encoder.width % encoder.heads:
            yield f"{path}.width", f"{encoder.width} is not a multiple of heads = {encoder.heads}", "change one of them"
        if encoder.type == "convnet" and not encoder.widths:
            yield f"{path}.widths", "a ConvNet without stages", "give one width a stage"
        odd = [width for width in encoder.widths if width % WIDTH_UNIT] if encoder.type == "convnet" else []
        if odd:
            yield f"{path}.widths", f"{odd[0]} is not a multiple of {WIDTH_UNIT}", "its GroupNorms have so many groups"
        if len(encoder.widths) > MOST_STAGES:
            yield f"{path}.widths", f"{len(encoder.widths)} stages, each of which halves the image", "give fewer"
            continue
        stride = encoder.patch_size if encoder.type == "vit" else 2 ** len(encoder.widths)
        if encoder.image_size % stride:
            what = f"{encoder.image_size} is not a multiple of the encoder's stride {stride}"
            yield f"{path}.image_size", what, f"use a multiple of {stride}"
        elif model.connector is not None and encoder_grid(encoder) % model.connector.grid:
            what = (
                f"{model.connector.grid} does not divide the grid of encoder {encoder.name!r}, {encoder_grid(encoder)}"
            )
            yield "model.connector.grid", what, "give a divisor"
