"""Connectors: feature maps of all encoders → image tokens [n, tokens, hidden_size]."""

from collections.abc import Sequence

from mmoe.models.connectors.mlp import MLPConnector
from mmoe.models.connectors.sva import SVAConnector
from mmoe.recipe.model import SVA, AnyConnector

__all__ = ["MLPConnector", "SVAConnector", "build_connector"]


def build_connector(
    config: AnyConnector, channels: Sequence[int], grids: Sequence[int], hidden_size: int
) -> MLPConnector | SVAConnector:
    """The connector that a recipe names, freshly initialised from torch's generator.

    Args:
        channels: of each encoder, the sum over its maps.
        grids: side at which each encoder's maps are read.
        hidden_size: the language model's width.

    Raises:
        ValueError: sizes that do not divide.
    """
    if isinstance(config, SVA):
        return SVAConnector(config, channels, grids, hidden_size)
    return MLPConnector(config, channels, hidden_size)
