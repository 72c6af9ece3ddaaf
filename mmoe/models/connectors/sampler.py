"""SVA within a language model (Cambrian-1, arXiv 2406.16860, section 3). The export ships this very file."""

import torch
from torch import Tensor

from mmoe.models.connectors.sva import Layer, Seen


def numbered(places: Tensor) -> Tensor:
    """int64 like ``places``, bool [b, s]: how many places come before, over the flattened batch."""
    return places.flatten().cumsum(0).view_as(places) - 1


class Sampler:
    """An SVA layer behind a layer of the language model: the hidden states of image tokens are its queries, and what it
    makes of them takes their places.

    Args:
        layer: its queries are as wide as the language model.
        seen: what it reads of the images.
        numbers: int64, of the shape of the hidden states without their last dimension: which image token, of all in the
            batch, stands at each place; −1 for none. Tokens that are not here (other ranks have them) ask nothing.
        side, tokens: of an image; a token that ends a row is no query.
    """

    def __init__(self, layer: Layer, seen: Seen, numbers: Tensor, side: int, tokens: int) -> None:
        self.layer, self.seen, self.side = layer, seen, side
        image, place = numbers.div(tokens, rounding_mode="floor"), numbers % tokens
        row, column = place // (tokens // side), place % (tokens // side)
        self.asks = (numbers >= 0) & (column < side)
        self.query = ((image * side + row) * side + column)[self.asks]

    def __call__(self, hidden: Tensor) -> Tensor:
        """[…, D] → the same."""
        images = self.seen.context.size(0)
        queries = hidden.new_zeros(images * self.side**2, hidden.size(-1))
        queries = queries.index_copy(0, self.query, hidden[self.asks])
        answers = self.layer(queries.view(images, self.side, self.side, -1), self.seen).flatten(0, 2)
        return hidden.masked_scatter(self.asks.unsqueeze(-1), answers[self.query].to(hidden.dtype))


def samplers(layers: torch.nn.ModuleList, first: int, step: int, *arguments) -> dict[int, Sampler]:
    """A :class:`Sampler` of each of ``layers``, by the number of the language model's layer that it stands behind;
    ``arguments``: its others."""
    return {first + i * step: Sampler(layer, *arguments) for i, layer in enumerate(layers)}  # type: ignore[arg-type]
