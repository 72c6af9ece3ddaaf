"""Vision encoders: pixels [n, 3, S, S], normalised (x/255 − 0.5) · 4 → maps of features, each [n, g, g, c] at the size
that it comes in; attributes ``channels``, the sum over the maps, and ``grid``, the side they are understood at."""

from mmoe.errors import UserError
from mmoe.models.encoders.convnet import ConvNet
from mmoe.models.encoders.convnext import ConvNeXt
from mmoe.models.encoders.vit import ViT
from mmoe.recipe.model import AnyEncoder

__all__ = ["ConvNeXt", "ConvNet", "ViT", "build_encoder"]


def build_encoder(config: AnyEncoder) -> ViT | ConvNeXt | ConvNet:
    """The encoder that a recipe names, freshly initialised from torch's generator.

    Raises:
        UserError: sizes that do not divide, or a layer or stage that is not there.
    """
    try:
        if config.type == "vit":
            return ViT(config)
        return ConvNeXt(config) if config.type == "convnext" else ConvNet(config)
    except ValueError as error:
        raise UserError(str(error), f"model.encoders, {config.name}", "change one of them") from None
