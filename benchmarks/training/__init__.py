"""Whole training steps: ours and the peers', their arithmetic, and where the time goes (``mmoe bench step``)."""

from mmoe.recipe.model import Longcat, Model, MoE


def parts_of(model: Model) -> tuple[Longcat, MoE]:
    """Backbone and experts of a LongCat model, which is all that is measured here."""
    assert isinstance(model.backbone, Longcat)
    assert model.moe is not None
    return model.backbone, model.moe
