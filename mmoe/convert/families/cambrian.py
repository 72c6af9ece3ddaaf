"""Cambrian-1 as its released checkpoints store it (cambrian-mllm/cambrian, ``cambrian/model``): Llama and connector.

The encoders are not in them: they are loaded from their own checkpoints.
"""

import re
from collections.abc import Iterator
from typing import Any

from mmoe.convert.families import llama
from mmoe.convert.families.fields import token_ids
from mmoe.convert.mapping import Entry, Table
from mmoe.errors import UserError
from mmoe.recipe.checks import Problem, encoder_grid
from mmoe.recipe.model import SVA, ConvNet, Llama, Model, ViT

ARCHITECTURE = "CambrianLlamaForCausalLM"
MODEL_TYPE = "cambrian_llama"
CONNECTOR = re.compile(r"model\.(vision_query$|image_newline$|mm_projector(_aux_\d+)?\.|vision_sampler_(\d+|layers)\.)")
"""The connector's tensors, by their names."""
HEADS = 16
"""Of every layer: written into ``vision_sampler.py``, no field has them."""
ENCODERS = "encoders"
"""The folder that an export has their own directories in."""
SOURCE = f"the released Cambrian-1\n(`{ARCHITECTURE}` of cambrian-mllm/cambrian)"
NOTE = (
    "the released code looks for one picture a text, at image_position of config.json; it finds encoders by their "
    "published names, which mm_vision_tower_aux_list has to be given"
)
FIX = "export it as MmoeForConditionalGeneration: --format mmoe"


def problems(model: Model) -> Iterator[Problem]:
    """Why the released ``CambrianLlamaForCausalLM`` does not compute what ``model`` does; nothing where it does."""
    connector = model.connector
    if not isinstance(model.backbone, Llama):
        yield "model.backbone.type", f"its language model is a 'llama', not {model.backbone.type!r}", FIX
    elif model.backbone.tied_embeddings:
        yield "model.backbone.tied_embeddings", "its output layer is not the embedding", FIX
    if not isinstance(connector, SVA):
        yield "model.connector.type", f"its connector is an 'sva', not {connector.type if connector else None!r}", FIX
        return
    wanted = {"heads": HEADS, "mixing": "joint", "scale": "head", "newline": True, "mask_padding": True}
    for key, value in wanted.items():
        if getattr(connector, key) != value:
            yield f"model.connector.{key}", f"it has {value!r} there, not {getattr(connector, key)!r}", FIX
    for index, encoder in enumerate(model.encoders):
        if isinstance(encoder, ConvNet):
            yield f"model.encoders.{index}.type", "a 'convnet' has no directory of its own in transformers or timm", FIX


def table(model: Model) -> Table:
    """Every tensor of a directory, of a model of which :func:`problems` has none."""
    assert isinstance(model.backbone, Llama)
    return connector(model) + llama.table(model.backbone)


def to_config(model: Model, dtype: str) -> dict[str, Any]:
    """Its ``config.json`` but ``image_aspect_ratio``. The towers' names are those of the folders that the encoders are
    in, in the place of those by which the released code finds published ones."""
    assert isinstance(model.backbone, Llama)
    return {
        **llama.to_config(model.backbone, dtype),
        **token_ids(model.special),
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **_fields(model),
        "mm_vision_tower_aux_list": [f"{ENCODERS}/{encoder.name}" for encoder in model.encoders],
        # Its CLIP alone reads this.
        "mm_vision_select_layer": next(
            (e.feature_layer for e in model.encoders if isinstance(e, ViT) and e.pre_norm), -2
        ),
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_position": 1,
        "unfreeze_mm_vision_tower": False,
        "use_mm_proj": True,
        "pretraining_tp": 1,
    }


def check(config: dict[str, Any], model: Model, where: str) -> None:
    """Raises :class:`UserError` unless a ``config.json`` is that of the connector of ``model``; it names the field on
    both sides."""
    for path, what, _ in problems(model):
        if path.startswith("model.connector"):
            raise UserError(f"the released Cambrian-1 has another connector: {what}", path, "change the recipe")
    towers, wanted = config.get("mm_vision_tower_aux_list"), _fields(model)
    if not isinstance(towers, list) or len(towers) != len(model.encoders):
        what = f"mm_vision_tower_aux_list is {towers!r}, the recipe has {len(model.encoders)} model.encoders"
        raise UserError(what, where, "give the recipe as many encoders, in that order")
    for key, value in wanted.items():
        if config.get(key) != value:
            what = f"{key} is {config.get(key)!r}, {OURS[key]} makes it {value!r} by the recipe"
            raise UserError(what, where, "change the recipe: see --set")


OURS = {
    "mm_projector_type": "model.connector.type",
    "vision_hidden_size": "model.connector.width",
    "connector_depth": "model.connector.layers",
    "num_query_group": "model.connector.groups",
    "query_num_list": "model.connector.groups",
    "image_token_len": "model.connector.grid",
    "mm_vision_tower_aux_token_len_list": "model.encoders.grid",
    "connector_only": "model.connector.inside",
    "num_of_vision_sampler_layers": "model.connector.inside.layers",
    "start_of_vision_sampler_layers": "model.connector.inside.start",
    "stride_of_vision_sampler_layers": "model.connector.inside.stride",
}
"""What in a recipe gives a field."""


def _fields(model: Model) -> dict[str, Any]:
    """Those of its ``config.json`` that tell of the connector."""
    config = model.connector
    assert isinstance(config, SVA)
    fields = {
        "mm_projector_type": "sva",
        "vision_hidden_size": config.width,
        "connector_depth": config.layers,
        "num_query_group": len(config.sides),
        "query_num_list": [side**2 for side in config.sides],
        "image_token_len": config.grid**2,
        "mm_vision_tower_aux_token_len_list": [encoder_grid(encoder) ** 2 for encoder in model.encoders],
        "connector_only": config.inside is None,
    }
    if config.inside:
        fields["num_of_vision_sampler_layers"] = config.inside.layers
        fields["start_of_vision_sampler_layers"] = config.inside.start
        fields["stride_of_vision_sampler_layers"] = config.inside.stride
    return fields


def connector(model: Model, prefix: str = "model.") -> Table:
    """Every tensor of an SVA connector of ``model``, its layers within the language model too."""
    config, count = model.connector, len(model.encoders)
    assert isinstance(config, SVA)
    grids = [encoder_grid(encoder) for encoder in model.encoders]
    entries = [Entry("connector.query", (f"{prefix}vision_query",))]
    for i in range(count):
        for part in (0, 2, 3):
            entries += _affine(f"connector.projectors.{i}.{part}", f"{prefix}mm_projector_aux_{i}.{part}")
    for part in (0, 2):
        entries += _affine(f"connector.out.{part}", f"{prefix}mm_projector.{part}")
    if config.newline:
        entries.append(Entry("connector.newline", (f"{prefix}image_newline",)))
    for group, side in enumerate(config.sides):
        windows = [grid // side for grid in grids]
        for i in range(config.layers):
            theirs = f"{prefix}vision_sampler_{group}.layers.{i}"
            entries += _layer(f"connector.groups.{group}.{i}", theirs, config, windows)
    if config.inside:
        windows = [grid // config.grid for grid in grids]
        for i in range(config.inside.layers):
            theirs = f"{prefix}vision_sampler_layers.{i}.layers.0"
            entries += _layer(f"connector.inside.{i}", theirs, config, windows)
    return Table(entries)


def _affine(ours: str, theirs: str) -> list[Entry]:
    return [Entry(f"{ours}.{part}", (f"{theirs}.{part}",)) for part in ("weight", "bias")]


def _mlp(ours: str, theirs: str) -> list[Entry]:
    pairs = (("up", "linear_1"), ("down", "linear_2"))
    return [Entry(f"{ours}.{mine}.weight", (f"{theirs}.{other}.weight",)) for mine, other in pairs]


def _attention(ours: str, theirs: str, suffixes: list[str]) -> Iterator[Entry]:
    yield from _affine(f"{ours}.query_norm", f"{theirs}.q_proj.0")
    yield Entry(f"{ours}.query.weight", (f"{theirs}.q_proj.1.weight",))
    yield Entry(f"{ours}.out.weight", (f"{theirs}.o_proj.weight",))
    for i, suffix in enumerate(suffixes):
        for mine, other in (("key", "k_proj"), ("value", "v_proj")):
            yield from _affine(f"{ours}.sources.{i}.{mine}_norm", f"{theirs}.{other}{suffix}.0")
            yield Entry(f"{ours}.sources.{i}.{mine}.weight", (f"{theirs}.{other}{suffix}.1.weight",))


def _layer(ours: str, theirs: str, config: SVA, windows: list[int]) -> Iterator[Entry]:
    yield Entry(f"{ours}.context.weight", (f"{theirs}.proj_context.weight",))
    yield Entry(f"{ours}.query_in.weight", (f"{theirs}.proj_in.weight",))
    yield from _affine(f"{ours}.norm", f"{theirs}.norm")
    yield from _mlp(f"{ours}.mlp", f"{theirs}.proj_out")
    joint = config.mixing == "joint"
    for i, window in enumerate(windows):
        place = f"{ours}.gather.sources.{i}" if joint else f"{ours}.gather.sources.{i}.sources.0"
        if window > 1:
            yield Entry(f"{place}.position", (f"{theirs}.pos_embed_{i}",))
    if joint:
        suffixes = [f"_{i}" for i in range(len(windows))]
        yield from _attention(f"{ours}.gather", f"{theirs}.cross_attn", suffixes)
        return
    if len(windows) > 1:
        yield from _mlp(f"{ours}.gather.gate", f"{theirs}.weight_mlp")
    for i, window in enumerate(windows):
        mine, other = f"{ours}.gather.sources.{i}", f"{theirs}.aggregate_{i}.attention_layer"
        yield from _attention(mine, other, [""]) if window > 1 else _mlp(mine, other)
