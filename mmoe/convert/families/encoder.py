"""What a family of transformers' vision encoders is described by, and what several of them share."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmoe.errors import UserError
from mmoe.recipe.model import ConvNeXt, ViT

Names = Mapping[str, str | tuple[str, ...]]
"""Our modules and parameters, ``#`` for each number in them → theirs, ``{}`` for each. Several of theirs make up one of
ours, one after another along dimension 0."""

ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
IMAGENET_STATISTICS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class Family:
    """What is particular to one of transformers' encoders."""

    architecture: str
    model_type: str
    table: type[ViT] | type[ConvNeXt]
    statistics: Mapping[str, tuple[float, float, float]]
    """Of the published models' pixels; a ``preprocessor_config.json`` may have others."""
    options: Mapping[str, Collection[Any]]
    """Our fields and what they may be, for it to compute the same; the first is taken where nothing else says."""
    same: Mapping[str, str]
    """Their fields that are ours under another name."""
    only: Mapping[str, Any]
    """Their fields with the one value that is supported, transformers' default."""
    defaults: Mapping[str, Any]
    """Of the other fields that are read, transformers': a ``config.json`` leaves out what has its default."""
    names: Callable[[Any], Names]
    read: Callable[[Mapping[str, Any], str], dict[str, Any]]
    """Their fields → those of ours that ``same`` has not."""
    write: Callable[[Any], dict[str, Any]]
    dims: Mapping[str, int] = field(default_factory=dict)
    """Of their tokens and positions, where there are not 2."""


def activation(fields: Mapping[str, Any], where: str) -> str:
    found = fields["hidden_act"]
    if not isinstance(found, str) or found not in ACTIVATIONS:
        raise UserError(f"hidden_act is {found!r}", where, f"only {', '.join(ACTIVATIONS)} are supported")
    return ACTIVATIONS[found]


def hidden_act(config: ViT) -> str:
    return next((theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation), "gelu")


def flag(fields: Mapping[str, Any], key: str, where: str) -> bool:
    if not isinstance(fields[key], bool):
        raise UserError(f"{key} is {fields[key]!r}", where, "give true or false")
    return fields[key]


def drops_border(fields: Mapping[str, Any], where: str) -> bool:
    size, patch = fields["image_size"], fields["patch_size"]
    for key, value in (("image_size", size), ("patch_size", patch)):
        if type(value) is not int or value < 1:
            raise UserError(f"{key} is {value!r}", where, "only one number of pixels, for squares, is supported")
    return size % patch != 0


def block_names(block: str, outer: Names, inner: Names) -> Names:
    """Names of a ViT: ``inner`` are those in a block, which theirs calls ``block``."""
    blocks = {
        f"blocks.#.{ours}": tuple(f"{block}.{part}" for part in ((theirs,) if isinstance(theirs, str) else theirs))
        for ours, theirs in inner.items()
    }
    return {**outer, **blocks}


VIT_FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "layer_norm_eps": "norm_eps",
}
VIT_DEFAULTS = {"image_size": 224, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
LEARNED = {"position": ("learned",), "rope_theta": (100.0,)}
