"""Cambrian-1's connector as its released checkpoints store it (cambrian-mllm/cambrian, ``cambrian/model``).

The encoders are not in them: they are loaded from their own checkpoints.
"""

from collections.abc import Iterator

from mmoe.convert.mapping import Entry
from mmoe.recipe.checks import encoder_grid
from mmoe.recipe.model import SVA, Model


def connector(model: Model, prefix: str = "model.") -> list[Entry]:
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
    return entries


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
