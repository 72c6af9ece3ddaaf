"""The Spatial Vision Aggregator (Cambrian-1, arXiv 2406.16860, section 3; arithmetic of the released code).

grid × grid queries gather from every encoder's grid, each from its own window. The export ships this very file.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmoe.ops.sva import Absorbed, Projected, sva


class Config(Protocol):
    """What the connector reads of its table in the recipe (:class:`mmoe.recipe.schema.Connector`)."""

    @property
    def grid(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def layers(self) -> int: ...


class Source(nn.Module):
    """Keys and values from one encoder: k = W_k · LayerNorm_k(F + position), v likewise, with its own weights."""

    def __init__(self, width: int, window: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(window**2, width)) if window > 1 else None
        self.key_norm = nn.LayerNorm(width)
        self.key = nn.Linear(width, width, bias=False)
        self.value_norm = nn.LayerNorm(width)
        self.value = nn.Linear(width, width, bias=False)
        if self.position is not None:
            nn.init.normal_(self.position, std=0.02)

    def forward(self, features: Tensor) -> Projected | Absorbed:
        # One key a query is cheapest projected; with several, absorbing the projections never computes them.
        if self.position is None:
            return Projected(self.key(self.key_norm(features)), self.value(self.value_norm(features)))
        return Absorbed(
            features,
            self.position,
            self.key_norm.weight,
            self.key_norm.bias,
            self.key.weight,
            self.value_norm.weight,
            self.value_norm.bias,
            self.value.weight,
            self.key_norm.eps,
        )


class Layer(nn.Module):
    """queries [n, L, L, width], every encoder's features [n, m·L, m·L, width], context [n, width] → queries."""

    def __init__(self, width: int, heads: int, windows: Sequence[int]) -> None:
        super().__init__()
        self.heads = heads
        self.context = nn.Linear(width, width, bias=False)
        self.query_in = nn.Linear(2 * width, width, bias=False)
        self.query_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.sources = nn.ModuleList(Source(width, window) for window in windows)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, width, bias=False)
        self.mlp_out = nn.Linear(width, width, bias=False)

    def forward(self, queries: Tensor, features: Sequence[Tensor], context: Tensor) -> Tensor:
        # query_in of [query ; context]: the context's half is the same for all queries of an image.
        of_query, of_context = self.query_in.weight.chunk(2, dim=1)
        about = F.linear(self.context(context), of_context)[:, None, None]
        start = F.linear(queries, of_query) + about
        q = self.query(self.query_norm(start)).unflatten(-1, (self.heads, -1))
        mixed = sva(q, [source(part) for source, part in zip(self.sources, features, strict=True)])
        gathered = self.norm(start + self.attention_out(mixed))
        return queries + self.mlp_out(F.gelu(self.mlp_in(gathered)))


class Connector(nn.Module):
    """[features of each encoder [n, grid_i, grid_i, channels_i]] → image tokens [n, grid², hidden_size]; n may be 0.

    Args:
        config: grid (queries a side), width, heads, layers.
        encoder_channels: channels_i; encoder 0 also gives the global context.
        encoder_grids: grid_i, each a multiple of ``config.grid``.
        hidden_size: the language model's width.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(
        self, config: Config, encoder_channels: Sequence[int], encoder_grids: Sequence[int], hidden_size: int
    ) -> None:
        super().__init__()
        width = config.width
        if width % config.heads:
            raise ValueError(f"connector: width {width} is no multiple of heads {config.heads}")
        if not encoder_grids or any(grid % config.grid for grid in encoder_grids):
            raise ValueError(f"connector: encoder grids {tuple(encoder_grids)} must be multiples of grid {config.grid}")
        self.grid = config.grid
        self.projectors = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width))
            for channels in encoder_channels
        )
        self.query = nn.Parameter(torch.empty(width))
        windows = [grid // config.grid for grid in encoder_grids]
        self.layers = nn.ModuleList(Layer(width, config.heads, windows) for _ in range(config.layers))
        self.out = nn.Sequential(nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))
        nn.init.normal_(self.query, std=0.02)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        projected = [project(part) for project, part in zip(self.projectors, features, strict=True)]
        n = projected[0].shape[0]
        context = projected[0].mean((1, 2))
        queries = self.query.expand(n, self.grid, self.grid, -1)
        for layer in self.layers:
            queries = layer(queries, projected, context)
        return self.out(queries).flatten(1, 2)
