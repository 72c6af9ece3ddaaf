"""The language model of a recipe as transformers stores it, whichever it is."""

from typing import Any

from mmoe.convert.families import llama, longcat
from mmoe.convert.mapping import Table
from mmoe.errors import UserError
from mmoe.recipe.model import Llama, Longcat, Model, MoE


def table(model: Model, *, fused: bool = False) -> Table:
    """Names of the language model; ``fused`` as in :func:`mmoe.convert.families.longcat.table`."""
    if isinstance(model.backbone, Llama):
        return llama.table(model.backbone)
    return longcat.table(model.backbone, _experts(model), fused=fused, mtp=model.mtp is not None)


def check_expressible(model: Model) -> None:
    """Raises :class:`UserError` where transformers' model computes something else, whatever its configuration."""
    if isinstance(model.backbone, Longcat):
        longcat.check_expressible(_experts(model))


def to_config(model: Model, dtype: str) -> dict[str, Any]:
    """Its ``config.json``."""
    if isinstance(model.backbone, Llama):
        return llama.to_config(model.backbone, dtype)
    ahead = {"num_nextn_predict_layers": 1} if model.mtp else {}
    return longcat.to_config(model.backbone, _experts(model), dtype) | ahead


def from_config(config: Any, where: str) -> tuple[Longcat | Llama, MoE | None]:
    """The sizes in a ``config.json``.

    Raises:
        UserError: another kind of model, a missing field, or a variant that is not supported.
    """
    kind = config.get("model_type") if isinstance(config, dict) else config
    if isinstance(config, dict) and kind == "llama":
        return llama.from_config(config, where), None
    if not isinstance(config, dict) or kind != "longcat_flash":
        raise UserError(f"model_type is {kind!r}", where, "language models that are read: longcat_flash, llama")
    return longcat.from_config(config, where)


def _experts(model: Model) -> MoE:
    assert model.moe is not None
    return model.moe
