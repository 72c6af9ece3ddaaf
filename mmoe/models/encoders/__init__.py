"""Vision encoders: pixels [n, 3, H, W] → features [n, grid, grid, channels]; attributes ``channels`` and ``grid``."""

from mmoe.errors import UserError
from mmoe.models.encoders.convnet import ConvNet
from mmoe.models.encoders.vit import ViT
from mmoe.recipe.model import AnyEncoder

__all__ = ["ConvNet", "ViT", "build_encoder"]


def build_encoder(config: AnyEncoder) -> ViT | ConvNet:
    """The encoder that a recipe names, freshly initialised from torch's generator.

    Raises:
        UserError: sizes that do not divide.
    """
    try:
        if config.type == "vit":
            return ViT(
                image_size=config.image_size,
                patch_size=config.patch_size,
                width=config.width,
                layers=config.layers,
                heads=config.heads,
            )
        if config.type == "convnext":
            raise ValueError("ConvNeXt is not there yet")
        return ConvNet(image_size=config.image_size, widths=config.widths)
    except ValueError as error:
        raise UserError(str(error), f"model.encoders, {config.name}", "choose sizes that divide") from None
