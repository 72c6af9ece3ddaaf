"""The Spatial Vision Aggregator (Cambrian-1, arXiv 2406.16860, section 3; arithmetic of the released code).

Squares of queries gather from every encoder's grid, each from its own window. The export ships this very file.

Exact algebra that the released code does not use: the context's half of ``query_in`` is computed once an image; an
encoder with one key a query has the statistics of its LayerNorms in common for keys, values and all layers; one with
several never makes keys and values (:class:`mmoe.reference.sva.Absorbed`); features are projected before they grow
(:class:`mmoe.models.connectors.maps.MapLinear`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmoe.models.connectors.maps import MapLinear, Maps, add_newline, resize, unpadded
from mmoe.ops.sva import Absorbed, Projected, sva
from mmoe.recipe.model import SVA


class Seen(NamedTuple):
    """What queries read of the images: for each encoder projected features [n, grid, grid, width], the same normalised
    without weight and bias where every query has one key there (else None), which cells are no padding (bool
    [n, grid, grid], or None: all); and the context [n, width], the mean of the first encoder's features."""

    features: list[Tensor]
    normalised: list[Tensor | None]
    valid: list[Tensor | None]
    context: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "Seen":
        """With ``function`` of every tensor that has a gradient."""
        hats = [None if hat is None else function(hat) for hat in self.normalised]
        return Seen([function(part) for part in self.features], hats, self.valid, function(self.context))


class Mlp(nn.Module):
    def __init__(self, inputs: int, middle: int, outputs: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(inputs, middle, bias=False), nn.Linear(middle, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def _after_norm(x_hat: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """linear(norm(x)) of x̂, x normalised: the norm's weight and bias go into the linear map."""
    wide = torch.promote_types(x_hat.dtype, torch.float32)
    weight = linear.weight.to(wide)
    return F.linear(x_hat, (weight * norm.weight).to(x_hat.dtype), (weight @ norm.bias.to(wide)).to(x_hat.dtype))


class Source(nn.Module):
    """Keys and values from one encoder: k = W_k · LayerNorm_k(F + position), v likewise, with its own weights."""

    def __init__(self, width: int, window: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(window**2, width) * 0.02) if window > 1 else None
        self.key_norm = nn.LayerNorm(width)
        self.key = nn.Linear(width, width, bias=False)
        self.value_norm = nn.LayerNorm(width)
        self.value = nn.Linear(width, width, bias=False)

    def forward(self, features: Tensor, normalised: Tensor | None) -> Projected | Absorbed:
        # One key a query is cheapest projected; with several, absorbing the projections never computes them.
        if self.position is None:
            assert normalised is not None
            key = _after_norm(normalised, self.key_norm, self.key)
            return Projected(key, _after_norm(normalised, self.value_norm, self.value))
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


class Joint(nn.Module):
    """One softmax over the keys of all encoders."""

    def __init__(self, config: SVA, windows: Sequence[int], _: int) -> None:
        super().__init__()
        width = config.width
        self.heads, self.factor = config.heads, _factor(config)
        self.query_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.sources = nn.ModuleList(Source(width, window) for window in windows)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, start: Tensor, _: Tensor, seen: Seen) -> Tensor:
        q = self.query(self.query_norm(start)).unflatten(-1, (self.heads, -1)) * self.factor
        sources = [
            source(part, hat) for source, part, hat in zip(self.sources, seen.features, seen.normalised, strict=True)
        ]
        return self.out(sva(q, sources, seen.valid))


class Separate(nn.Module):
    """One attention an encoder, weighted by a softmax over the encoders. Where a query has one key there is nothing to
    choose, and an MLP takes the place of attention."""

    def __init__(self, config: SVA, windows: Sequence[int], queries: int) -> None:
        super().__init__()
        width = config.width
        self.gate = Mlp(queries + width, width, len(windows)) if len(windows) > 1 else None
        self.sources = nn.ModuleList(
            Joint(config, [window], queries) if window > 1 else Mlp(width, width, width) for window in windows
        )

    def forward(self, start: Tensor, given: Tensor, seen: Seen) -> Tensor:
        """``given``: queries and context side by side, before they are mapped."""
        parts = [
            source(start, given, Seen([part], [None], [valid], seen.context))
            if isinstance(source, Joint)
            else source(part)
            for source, part, valid in zip(self.sources, seen.features, seen.valid, strict=True)
        ]
        if self.gate is None:
            return parts[0]
        return (torch.stack(parts, dim=-1) * self.gate(given).softmax(-1).unsqueeze(-2)).sum(-1)


def _factor(config: SVA) -> float:
    """What brings the operator's 1/√(head width) to the recipe's scale."""
    return 1.0 if config.scale == "head" else config.heads**-0.5


class Layer(nn.Module):
    """queries [n, L, L, q] and what they see → queries; ``width`` is that of what they see.

    q₀ = W_in [query ; W_c context];   r = LayerNorm(q₀ + gathered);   out = query + MLP(r)
    """

    def __init__(self, config: SVA, windows: Sequence[int], queries: int) -> None:
        super().__init__()
        width = config.width
        self.context = nn.Linear(width, width, bias=False)
        self.query_in = nn.Linear(queries + width, width, bias=False)
        self.gather = (Joint if config.mixing == "joint" else Separate)(config, windows, queries)
        self.norm = nn.LayerNorm(width)
        self.mlp = Mlp(width, width, queries)

    def forward(self, queries: Tensor, seen: Seen) -> Tensor:
        # The context's half of query_in is the same for all queries of an image.
        context = self.context(seen.context)
        of_query, of_context = self.query_in.weight.split((queries.shape[-1], context.shape[-1]), dim=1)
        start = F.linear(queries, of_query) + F.linear(context, of_context)[:, None, None]
        given = queries
        if isinstance(self.gather, Separate):
            about = context[:, None, None].expand(*queries.shape[:3], -1)
            given = torch.cat((queries, about), dim=-1)
        return queries + self.mlp(self.norm(start + self.gather(start, given, seen)))


class SVAConnector(nn.Module):
    """Feature maps of all encoders → image tokens [n, tokens, hidden_size]; n may be 0.

    Args:
        config: the recipe's table.
        channels: of each encoder, the sum over its maps; encoder 0 also gives the global context.
        grids: side at which each encoder is read, a multiple of the side of every group of queries.
        hidden_size: the language model's width.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(self, config: SVA, channels: Sequence[int], grids: Sequence[int], hidden_size: int) -> None:
        super().__init__()
        width, sides = config.width, config.sides
        if width % config.heads:
            raise ValueError(f"connector: width {width} is no multiple of heads {config.heads}")
        if not grids or any(grid % side for grid in grids for side in (*sides, config.grid)):
            raise ValueError(f"connector: encoder grids {tuple(grids)} must be multiples of {sides} and {config.grid}")
        self.grid, self.tokens, self.sides, self.grids = config.grid, config.tokens, sides, list(grids)
        self.single = {*sides, config.grid}
        """Sides of an encoder's grid at which some query has one key there."""
        self.masks_padding = config.mask_padding
        self.projectors = nn.ModuleList(
            nn.Sequential(MapLinear(count, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width))
            for count in channels
        )
        self.query = nn.Parameter(torch.randn(len(sides), width) * 0.02)

        def layers(count: int, side: int, queries: int) -> nn.ModuleList:
            windows = [grid // side for grid in grids]
            return nn.ModuleList(Layer(config, windows, queries) for _ in range(count))

        self.groups = nn.ModuleList(layers(config.layers, side, width) for side in sides)
        self.out = nn.Sequential(
            nn.Linear(len(sides) * width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )
        self.newline = nn.Parameter(torch.randn(hidden_size) * hidden_size**-0.5) if config.newline else None
        self.inside = layers(config.inside.layers, self.grid, hidden_size) if config.inside else None

    def see(self, features: Sequence[Maps], original_sizes: Tensor | None = None) -> Seen:
        """What the queries read; ``original_sizes`` as in :func:`mmoe.models.connectors.maps.unpadded`."""
        projected = []
        for project, maps, grid in zip(self.projectors, features, self.grids, strict=True):
            assert isinstance(project, nn.Sequential)
            first, *others = project
            x = first(maps, grid)
            for module in others:
                x = module(x)
            projected.append(x)
        normalised = [
            F.layer_norm(x, x.shape[-1:]) if grid in self.single else None
            for x, grid in zip(projected, self.grids, strict=True)
        ]
        valid: list[Tensor | None] = [None] * len(projected)
        if self.masks_padding:
            if original_sizes is None:
                raise ValueError("the connector masks padding: it needs the images' original sizes")
            valid = [unpadded(original_sizes, grid) for grid in self.grids]
        return Seen(projected, normalised, valid, projected[0].mean((1, 2)))

    def rows(self, seen: Seen) -> Tensor:
        """Image tokens [n, tokens, hidden_size]."""
        n = seen.context.shape[0]
        groups = []
        for query, side, layers in zip(self.query, self.sides, self.groups, strict=True):
            queries = query.expand(n, side, side, -1)
            assert isinstance(layers, nn.ModuleList)
            for layer in layers:
                queries = layer(queries, seen)
            groups.append(resize(queries, self.grid))
        return add_newline(self.out(torch.cat(groups, dim=-1)), self.newline)

    def forward(self, features: Sequence[Maps], original_sizes: Tensor | None = None) -> Tensor:
        return self.rows(self.see(features, original_sizes))
