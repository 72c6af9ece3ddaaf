"""ConvNeXt (Liu et al., arXiv 2201.03545): a convolutional network with the proportions of a transformer.

Torch only: the Hugging Face export ships this very file.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmoe.models.encoders.normalise import renormalise
from mmoe.recipe.model import ConvNeXt as Config

STD, SCALE = 0.02, 1e-6
"""First weights of convolutions and linears, and first layer scales: the paper's, appendix A.1."""


class Block(nn.Module):
    """[n, h, w, c] → the same: 7 × 7 a channel each, LayerNorm, a GELU MLP, added."""

    def __init__(self, channels: int, config: Config) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, config.norm_eps)
        self.mlp_in = nn.Linear(channels, 4 * channels)
        self.mlp_out = nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.empty(channels)) if config.layer_scale else None

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        mapped = self.mlp_out(F.gelu(self.mlp_in(self.norm(mixed))))
        return x + (mapped if self.scale is None else mapped * self.scale)


class Stage(nn.Module):
    """[n, h, w, c_in] → [n, h/2, w/2, c_out]; the first stage, behind the stem, leaves the size."""

    def __init__(self, channels_in: int, channels_out: int, depth: int, first: bool, config: Config) -> None:
        super().__init__()
        self.norm = None if first else nn.LayerNorm(channels_in, config.norm_eps)
        self.down = None if first else nn.Conv2d(channels_in, channels_out, 2, 2)
        self.blocks = nn.ModuleList(Block(channels_out, config) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None and self.down is not None:
            x = self.down(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        return x


class ConvNeXt(nn.Module):
    """Pixels [n, 3, image_size, image_size], normalised (x/255 − 0.5) · 4 → a map of features [n, g, g, c] for each of
    ``feature_stages``, in that order; n may be 0.

    ``channels`` is the sum over the maps, ``grid`` the side that they are understood at: the recipe's, to which the
    connector resizes them, or the last one's own. Stages behind the last one named, and the pooled map's norm, have
    their weights, for the export, and take no gradient.

    Raises:
        ValueError: sizes that do not divide, or stages that are not there.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        stages = len(config.widths)
        if not stages or len(config.depths) != stages:
            raise ValueError(f"depths {config.depths} must be one for each of widths {config.widths}")
        stride = config.patch_size * 2 ** (stages - 1)
        if config.image_size % stride:
            raise ValueError(f"image_size {config.image_size} is no multiple of {stride}, the stride of the last stage")
        if not config.feature_stages or any(not -stages <= s < stages for s in config.feature_stages):
            raise ValueError(f"feature_stages {config.feature_stages} names none or one that is not there")
        self.config = config
        self.feature_stages = [stage % stages for stage in config.feature_stages]
        self.channels = sum(config.widths[stage] for stage in self.feature_stages)
        self.grid = config.grid or config.image_size // (config.patch_size * 2 ** self.feature_stages[-1])
        self.stem = nn.Conv2d(3, config.widths[0], config.patch_size, config.patch_size)
        self.stem_norm = nn.LayerNorm(config.widths[0], config.norm_eps)
        inputs = (config.widths[0], *config.widths[:-1])
        sizes = zip(inputs, config.widths, config.depths, strict=True)
        self.stages = nn.ModuleList(Stage(a, b, depth, i == 0, config) for i, (a, b, depth) in enumerate(sizes))
        self.norm = nn.LayerNorm(config.widths[-1], config.pooled_norm_eps) if config.pooling == "norm" else None
        self.stages[max(self.feature_stages) + 1 :].requires_grad_(False)
        if self.norm is not None:
            self.norm.requires_grad_(False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=STD)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, Block) and module.scale is not None:
                nn.init.constant_(module.scale, SCALE)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        x = self.stem_norm(self.stem(renormalise(pixels, self.config)).permute(0, 2, 3, 1))
        maps: list[Tensor] = []
        for stage in self.stages[: max(self.feature_stages) + 1]:
            x = stage(x)
            maps.append(x)
        return [maps[stage] for stage in self.feature_stages]
