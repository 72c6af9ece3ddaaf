"""A stack of linear maps on the encoders' features (LLaVA, arXiv 2304.08485; LLaVA-1.5, arXiv 2310.03744; Yi-VL,
arXiv 2403.04652, section 7.2).

Torch only: the Hugging Face export ships this very file.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmoe.models.connectors.maps import MapLinear, Maps, add_newline
from mmoe.recipe.model import MLP, Linear


class MLPConnector(nn.Module):
    """The features of all encoders, resized to ``grid`` and put together along the channels → image tokens
    [n, tokens, hidden_size].

    linear:           W x
    mlp:              W₂ gelu(W₁ x)                        (LLaVA-1.5)
    mlp with norm:    LN₂(W₂ gelu(LN₁(W₁ x)))              (Yi-VL)
    """

    inside = None

    def __init__(self, config: MLP | Linear, channels: Sequence[int], hidden_size: int) -> None:
        super().__init__()
        layers, norm = (config.layers, config.norm) if isinstance(config, MLP) else (1, False)
        self.grid, self.tokens = config.grid, config.tokens
        self.first = MapLinear(sum(channels), hidden_size)
        self.further = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(layers - 1))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_size) for _ in range(layers if norm else 0))
        self.newline = nn.Parameter(torch.randn(hidden_size) * hidden_size**-0.5) if config.newline else None

    def forward(self, features: Sequence[Maps], original_sizes: Tensor | None = None) -> Tensor:
        """``original_sizes`` is for connectors that mask padding, which this one does not."""
        x = self._normed(0, self.first([part for maps in features for part in maps], self.grid))
        for index, linear in enumerate(self.further, start=1):
            x = self._normed(index, linear(F.gelu(x)))
        return add_newline(x, self.newline)

    def _normed(self, index: int, x: Tensor) -> Tensor:
        return self.norms[index](x) if len(self.norms) else x
