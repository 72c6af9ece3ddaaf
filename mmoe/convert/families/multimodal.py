"""The whole model as the exported ``MmoeForConditionalGeneration`` stores it: our names but in the language model."""

from typing import Any, cast

from mmoe.convert.families import language
from mmoe.convert.mapping import Entry, Table
from mmoe.errors import UserError
from mmoe.models.count import vision_modules
from mmoe.recipe.load import typed
from mmoe.recipe.model import AnyConnector, AnyEncoder, Model


def table(model: Model, *, fused: bool = True) -> Table:
    """Every tensor of the model; ``fused`` as in :func:`mmoe.convert.families.longcat.table`."""
    vision = Table([Entry(name, (name,)) for name in _vision_names(model)])
    return vision + language.table(model, fused=fused).prefixed(theirs="language_model.")


def from_config(config: dict[str, Any], where: str) -> Model:
    """The model in a whole export's ``config.json``.

    Raises:
        UserError: see :func:`mmoe.convert.families.language.from_config`; or an unknown field.
    """
    backbone, moe = language.from_config(config.get("text_config", {}), where)
    encoders, connector = config.get("encoders"), config.get("connector")
    if not isinstance(encoders, list) or not encoders:
        raise UserError("no encoders", where, "export the model again")
    return Model(
        backbone=backbone,
        moe=moe,
        encoders=tuple(typed(cast(Any, AnyEncoder), fields, where) for fields in encoders),
        connector=typed(cast(Any, AnyConnector), connector, where),
    )


def _vision_names(model: Model) -> list[str]:
    """Names of the encoders' and the connector's tensors."""
    return [f"{where}.{name}" for where, module in vision_modules(model).items() for name in module.state_dict()]
