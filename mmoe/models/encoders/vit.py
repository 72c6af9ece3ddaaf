"""A vision transformer (Dosovitskiy et al., arXiv 2010.11929) in the forms of CLIP, SigLIP, DINOv2 and DINOv3.

Torch only: the Hugging Face export ships this very file.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmoe.models.encoders.normalise import renormalise
from mmoe.recipe.model import ViT as Config

STD = 0.02
"""Of first weights: residual branches, positions, tokens of no place."""

Rotation = tuple[Tensor, Tensor]
"""cos and sin, [patches, head width]."""


def activate(x: Tensor, activation: str) -> Tensor:
    """[…, a] → […, a]; ``swiglu`` halves the last dimension: silu(gate) · up of (gate, up)."""
    match activation:
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
        case "swiglu":
            gate, up = x.chunk(2, -1)
            return F.silu(gate) * up
    raise ValueError(f"activation {activation!r} is not known")


def patch_rotation(grid: int, head_width: int, theta: float, like: Tensor) -> Rotation:
    """Rotary angles of grid² patches, row by row, in the dtype and on the device of ``like``.

    A patch's centre (y, x) in [−1, 1]² turns the pairs (i, i + head_width / 2) by 2π · y · theta^(−4i / head_width)
    for i below head_width / 4, and the others by the same of x. As transformers' ``DINOv3ViTRopePositionEmbedding``
    does, in fp32 whatever ``like`` is, and in fp64 from the product on where it is that.
    """
    side = 2.0 * (torch.arange(0.5, grid, dtype=torch.float32, device=like.device) / grid) - 1.0
    centres = torch.stack(torch.meshgrid(side, side, indexing="ij"), dim=-1).flatten(0, 1)
    steps = torch.arange(0, 1, 4 / head_width, dtype=torch.float32, device=like.device)
    frequencies = (1 / theta**steps).to(torch.promote_types(torch.float32, like.dtype))
    angles = (2 * torch.pi * centres[:, :, None] * frequencies).flatten(1, 2).tile(2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """The last tokens of [n, heads, tokens, head width], which are the patches, turned; those before them stay."""
    cos, sin = rotation
    patches = x[..., -len(cos) :, :]
    low, high = patches.chunk(2, -1)
    turned = patches * cos + torch.cat([-high, low], -1) * sin
    return torch.cat([x[..., : -len(cos), :], turned], -2)


class Block(nn.Module):
    """Pre-norm attention and MLP: [n, tokens, width] → the same."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, mlp_width, eps = config.width, config.mlp_width or 4 * config.width, config.norm_eps
        self.heads = config.heads
        """On this rank: tensor parallelism leaves it a part of them."""
        self.activation = config.activation
        self.attention_norm = nn.LayerNorm(width, eps)
        self.query = nn.Linear(width, width, bias=config.query_value_bias)
        self.key = nn.Linear(width, width, bias=config.key_bias)
        self.value = nn.Linear(width, width, bias=config.query_value_bias)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps)
        self.mlp_in = nn.Linear(width, 2 * mlp_width if config.activation == "swiglu" else mlp_width)
        self.mlp_out = nn.Linear(mlp_width, width)
        self.attention_scale = nn.Parameter(torch.ones(width)) if config.layer_scale else None
        self.mlp_scale = nn.Parameter(torch.ones(width)) if config.layer_scale else None

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        attended = self._attention(self.attention_norm(x), rotation)
        x = x + (attended if self.attention_scale is None else attended * self.attention_scale)
        mapped = self.mlp_out(activate(self.mlp_in(self.mlp_norm(x)), self.activation))
        return x + (mapped if self.mlp_scale is None else mapped * self.mlp_scale)

    def _attention(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return self.attention_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class AttentionPool(nn.Module):
    """The weights of SigLIP's head, one learned query over the features. They are carried along, nothing here runs
    them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, mlp_width = config.width, config.mlp_width or 4 * config.width
        self.probe = nn.Parameter(torch.empty(1, width))
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, config.norm_eps)
        self.mlp_in = nn.Linear(width, mlp_width)
        self.mlp_out = nn.Linear(mlp_width, width)


class ViT(nn.Module):
    """Pixels [n, 3, image_size, image_size], normalised (x/255 − 0.5) · 4 → one map of features [n, g, g, channels],
    g = image_size // patch_size; n may be 0.

    ``grid`` is the side that the map is understood at: the recipe's, to which the connector resizes it, or g. What the
    features do not need (blocks behind ``feature_layer``, a pooling head, the mask token) has its weights, for the
    export, and takes no gradient.

    Raises:
        ValueError: sizes that do not divide, or a feature layer that is not there.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        size, patch, width = config.image_size, config.patch_size, config.width
        if size < patch or (size % patch and not config.drop_border):
            raise ValueError(f"image_size {size} is no multiple of patch_size {patch}")
        if width % config.heads:
            raise ValueError(f"width {width} is no multiple of heads {config.heads}")
        if config.position == "rope" and width // config.heads % 4:
            raise ValueError(f"heads of {width // config.heads} are no multiple of 4, as rotary pairs of two axes need")
        if not -config.layers <= config.feature_layer < config.layers:
            raise ValueError(f"feature_layer {config.feature_layer} names none of {config.layers} layers")
        self.config = config
        self.channels = width
        self.native_grid = size // patch
        self.grid = config.grid or self.native_grid
        self.used_blocks = config.feature_layer % config.layers + 1
        self.patches = nn.Conv2d(3, width, patch, patch, bias=config.patch_bias)
        rows = config.class_token + self.native_grid**2
        learned = config.position == "learned"
        self.position = nn.Parameter(torch.empty(rows, width)) if learned else None
        self.class_token = nn.Parameter(torch.empty(1, width)) if config.class_token else None
        self.registers = nn.Parameter(torch.empty(config.registers, width)) if config.registers else None
        self.mask_token = nn.Parameter(torch.empty(1, width), requires_grad=False) if config.mask_token else None
        self.pre_norm = nn.LayerNorm(width, config.norm_eps) if config.pre_norm else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        has_norm = config.final_norm or config.pooling != "none"
        self.norm = nn.LayerNorm(width, config.norm_eps) if has_norm else None
        self.pool = AttentionPool(config) if config.pooling == "attention" else None
        self.blocks[self.used_blocks :].requires_grad_(False)
        for unused in (self.pool, None if config.final_norm else self.norm):
            if unused is not None:
                unused.requires_grad_(False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small residual branches: with torch's defaults a small ViT did not start to learn from scratch."""
        nn.init.kaiming_normal_(self.patches.weight, nonlinearity="relu")
        if self.patches.bias is not None:
            nn.init.zeros_(self.patches.bias)
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.normal_(block.attention_out.weight, std=STD)
            nn.init.normal_(block.mlp_out.weight, std=STD)
        probe = self.pool.probe if self.pool is not None else None
        for parameter in (self.position, self.class_token, self.registers, probe):
            if parameter is not None:
                nn.init.normal_(parameter, std=STD)
        if self.mask_token is not None:
            nn.init.zeros_(self.mask_token)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        x = self._embed(renormalise(pixels, self.config))
        rotation = None
        if self.config.position == "rope":
            head_width = self.channels // self.config.heads
            rotation = patch_rotation(self.native_grid, head_width, self.config.rope_theta, x)
        for block in self.blocks[: self.used_blocks]:
            x = block(x, rotation)
        x = x[:, -(self.native_grid**2) :]
        if self.norm is not None and self.config.final_norm:
            x = self.norm(x)
        return [x.unflatten(1, (self.native_grid, self.native_grid))]

    def _embed(self, pixels: Tensor) -> Tensor:
        """Tokens [n, class token + registers + patches, width]."""
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        front = [] if self.class_token is None else [self.class_token]
        if self.position is not None:
            rows = len(self.position) - self.native_grid**2
            x = x + self.position[rows:]
            front = [token + self.position[:rows] for token in front]
        front += [] if self.registers is None else [self.registers]
        if front:
            x = torch.cat([*(token.expand(len(x), -1, -1) for token in front), x], dim=1)
        return x if self.pre_norm is None else self.pre_norm(x)


def resize_position(position: Tensor, config: Config) -> Tensor:
    """Learned positions [(1 +) g², width] of some grid → those of ``config``'s, interpolated over the square as
    transformers' ``interpolate_pos_encoding`` does; the class token's, the first row, stays. Arithmetic is in fp32 or
    better, the result in the dtype of ``position``.

    Raises:
        ValueError: the rows make no square.
    """
    grid, front = config.image_size // config.patch_size, int(config.class_token)
    side = round(max(0, len(position) - front) ** 0.5)
    if front + side**2 != len(position) or not side:
        raise ValueError(f"{len(position)} positions are no square{' and a class token' if front else ''}")
    if side == grid:
        return position
    square = position[front:].unflatten(0, (side, side)).permute(2, 0, 1)[None]
    wide = square.to(torch.promote_types(torch.float32, position.dtype))
    # A ViT with both learned positions and registers is DINOv2's, the one that transformers antialiases.
    antialias = config.registers > 0
    resized = F.interpolate(wide, size=(grid, grid), mode="bicubic", align_corners=False, antialias=antialias)
    rows = resized[0].permute(1, 2, 0).flatten(0, 1).to(position.dtype)
    return torch.cat([position[:front], rows])
