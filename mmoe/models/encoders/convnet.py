"""A small convolutional encoder with GroupNorm; every stage halves the grid.

Torch only: the Hugging Face export ships this very file.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mmoe.models.encoders.normalise import renormalise
from mmoe.recipe.model import ConvNet as Config

GROUPS = 8


class ResidualBlock(nn.Module):
    """[n, c, h, w] → the same: GroupNorm, GELU, 3 × 3, GELU, 3 × 3, added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_out(F.gelu(self.conv_in(F.gelu(self.norm(x)))))


class Stage(nn.Module):
    """[n, c_in, h, w] → [n, c_out, h/2, w/2]; the first stage, at the largest grid, has no residual block."""

    def __init__(self, channels_in: int, channels_out: int, residual: bool) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(GROUPS, channels_out)
        self.block = ResidualBlock(channels_out) if residual else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(F.gelu(self.norm(self.down(x))))


class ConvNet(nn.Module):
    """Pixels [n, 3, image_size, image_size], normalised (x/255 − 0.5) · 4 → one map of features [n, g, g, channels],
    g = image_size / 2^len(widths); n may be 0. ``grid`` is the recipe's, to which the connector resizes it, or g.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        size, widths = config.image_size, config.widths
        stride = 2 ** len(widths)
        if not widths or any(width % GROUPS for width in widths):
            raise ValueError(f"widths {widths} must be one or more multiples of {GROUPS}")
        if size % stride:
            raise ValueError(f"image_size {size} is no multiple of {stride}, the stride of {len(widths)} stages")
        self.config = config
        self.channels = widths[-1]
        self.grid = config.grid or size // stride
        inputs = (3, *widths[:-1])
        self.stages = nn.ModuleList(Stage(a, b, i > 0) for i, (a, b) in enumerate(zip(inputs, widths, strict=True)))
        self.norm = nn.LayerNorm(self.channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming on every convolution: with torch's default the encoder did not start to learn from scratch."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        x = renormalise(pixels, self.config)
        for stage in self.stages:
            x = stage(x)
        return [self.norm(x.permute(0, 2, 3, 1))]
