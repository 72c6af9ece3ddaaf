"""A vision transformer (Dosovitskiy et al., arXiv 2010.11929) whose output is the grid of its patches.

Torch only: the Hugging Face export ships this very file.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RESIDUAL_STD = 0.02


class Block(nn.Module):
    """Pre-norm attention and MLP: [n, tokens, width] → the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        x = x + self.attention_out(mixed)
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class ViT(nn.Module):
    """Pixels [n, 3, image_size, image_size] → features [n, grid, grid, channels]; n may be 0.

    Args:
        image_size: side in pixels, a multiple of ``patch_size``.
        patch_size: side of a patch in pixels; ``grid`` = image_size / patch_size.
        width: ``channels``, a multiple of ``heads``.
        layers: transformer blocks.
        heads: attention heads.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(self, *, image_size: int, patch_size: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is no multiple of patch_size {patch_size}")
        if width % heads:
            raise ValueError(f"width {width} is no multiple of heads {heads}")
        self.channels = width
        self.grid = image_size // patch_size
        self.patches = nn.Conv2d(3, width, patch_size, patch_size)
        self.position = nn.Parameter(torch.empty(self.grid**2, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small residual branches: with torch's defaults a small ViT did not start to learn from scratch."""
        nn.init.kaiming_normal_(self.patches.weight, nonlinearity="relu")
        assert self.patches.bias is not None
        nn.init.zeros_(self.patches.bias)
        nn.init.normal_(self.position, std=RESIDUAL_STD)
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.normal_(block.attention_out.weight, std=RESIDUAL_STD)
            nn.init.normal_(block.mlp_out.weight, std=RESIDUAL_STD)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        x = self.patches(pixels).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return [self.norm(x).view(len(pixels), self.grid, self.grid, self.channels)]
