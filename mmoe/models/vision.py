"""The part of a model that sees: encoders and connector, in the order in which they take torch's random numbers."""

from collections.abc import Iterator

from mmoe.models.connectors import MLPConnector, SVAConnector, build_connector
from mmoe.models.encoders import ConvNet, ConvNeXt, ViT, build_encoder
from mmoe.recipe.model import Model


def build_vision(model: Model) -> Iterator[tuple[str, ViT | ConvNeXt | ConvNet | MLPConnector | SVAConnector]]:
    """The encoders and the connector, each with its name in the model, one after another, freshly initialised from
    torch's generator. Who lets go of each before the next one holds one at a time.

    Raises:
        UserError, ValueError: see :func:`build_encoder` and :func:`build_connector`.
    """
    channels, grids = [], []
    for config in model.encoders:
        encoder = build_encoder(config)
        channels.append(encoder.channels)
        grids.append(encoder.grid)
        yield f"encoders.{config.name}", encoder
        del encoder
    if model.connector is not None:
        yield "connector", build_connector(model.connector, channels, grids, model.backbone.hidden_size)
