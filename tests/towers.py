"""Encoders of others with random weights: transformers' features as ours are given, OpenCLIP's tower, timm's names."""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from mmoe.recipe import model


@dataclass(frozen=True)
class Pair:
    """transformers' encoder with random weights, its files, and ours made of them."""

    theirs: Any
    folder: Path
    config: model.ViT | model.ConvNeXt
    ours: Any

    @property
    def disk(self) -> dict[str, Tensor]:
        return load_file(self.folder / "model.safetensors")


@torch.no_grad()
def their_maps(made: Pair, theirs: Any, pixels: Tensor) -> list[Tensor]:
    """The same features out of transformers' encoder, channels last; ``pixels`` are normalised as ours are."""
    mean, std = (torch.tensor(made.config.__dict__[key], dtype=torch.float64)[:, None, None] for key in ("mean", "std"))
    own = ((pixels.double() / 4 + 0.5 - mean) / std).to(pixels.dtype)
    learned = isinstance(theirs, transformers.CLIPVisionModel | transformers.SiglipVisionModel)
    options = {"interpolate_pos_encoding": True} if learned else {}
    out = theirs(own, output_hidden_states=True, **options)
    if isinstance(made.config, model.ConvNeXt):
        states = out.hidden_states[-len(made.config.widths) :]
        return [states[stage].permute(0, 2, 3, 1) for stage in made.config.feature_stages]
    states = out.hidden_states[made.config.feature_layer]
    if made.config.final_norm:
        states = (
            theirs.post_layernorm(states) if isinstance(theirs, transformers.CLIPVisionModel) else out.last_hidden_state
        )
    side = pixels.shape[-1] // made.config.patch_size
    return [states[:, -(side**2) :].unflatten(1, (side, side))]


class OpenClipBlock(nn.Module):
    """A block of OpenCLIP's tower around torch's own attention; its modules give the names of OpenCLIP's tensors."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = [("c_fc", nn.Linear(width, mlp_width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(mlp_width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class OpenClip(nn.Module):
    """OpenCLIP's tower up to the patches of its last block."""

    def __init__(self, width: int, heads: int, mlp_width: int, layers: int, grid: int, patch: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(1 + grid**2, width))
        self.proj = nn.Parameter(torch.randn(width, 8))
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(OpenClipBlock(width, heads, mlp_width) for _ in range(layers))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer.resblocks:
            x = block(x)
        return x[:, 1:]


TIMM = [
    (r"embeddings\.patch_embeddings", "stem.0"),
    (r"embeddings\.layernorm", "stem.1"),
    (r"^layernorm", "head.norm"),
    (r"encoder\.(stages\.\d+)\.downsampling_layer", r"\1.downsample"),
    (r"encoder\.(stages\.\d+)\.layers\.(\d+)", r"\1.blocks.\2"),
    (r"dwconv", "conv_dw"),
    (r"\.layernorm", ".norm"),
    (r"pwconv(\d)", r"mlp.fc\1"),
    (r"layer_scale_parameter", "gamma"),
]
"""transformers' names of a ConvNeXt → timm's, one pattern after another."""
