"""Feature maps of encoders on their way to one grid.

Torch only: the Hugging Face export ships this very file.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Maps = Sequence[Tensor]
"""What an encoder gives: feature maps [n, side, side, channels], each with a side and channels of its own."""


def resize(x: Tensor, side: int) -> Tensor:
    """[n, h, h, c] → [n, side, side, c], bilinear between cell centres in fp32, as released Cambrian-1 does."""
    if x.shape[1] == side:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    x_nchw = x.permute(0, 3, 1, 2).to(wide)
    out = F.interpolate(x_nchw, size=(side, side), mode="bilinear", align_corners=False)
    return out.permute(0, 2, 3, 1).to(x.dtype)


class MapLinear(nn.Linear):
    """A linear map of all maps put together along the channels, at ``side``: [n, side, side, outputs].

    Bilinear resizing and a linear map commute. A map that would grow is projected first, so that the wide tensor of all
    channels at ``side`` is never made.
    """

    def forward(self, maps: Maps, side: int) -> Tensor:  # type: ignore[override]
        parts = self.weight.split([part.shape[-1] for part in maps], dim=1)
        out = None
        for part, weight in zip(maps, parts, strict=True):
            grows = part.shape[1] < side
            here = resize(F.linear(part, weight), side) if grows else F.linear(resize(part, side), weight)
            out = here if out is None else out + here
        assert out is not None
        return out if self.bias is None else out + self.bias


def add_newline(rows: Tensor, newline: Tensor | None) -> Tensor:
    """Tokens [n, side, side, D] → [n, tokens, D], row by row, each ended by ``newline`` [D] where there is one."""
    if newline is not None:
        ends = newline.to(rows.dtype).expand(rows.shape[0], rows.shape[1], 1, -1)
        rows = torch.cat((rows, ends), dim=2)
    return rows.flatten(1, 2)


def unpadded(original_sizes: Tensor, side: int) -> Tensor:
    """bool [n, side, side]: the cells that are not padding, of images padded to a square in the middle.

    original_sizes: int64 [n, 2], height and width before that. The released Cambrian-1's arithmetic
    (``unmask_attention_mask``): the picture has ⌊short · side / long⌋ cells, half of the rest is cut on either side.
    """
    height, width = original_sizes.double().unbind(1)
    cells = torch.arange(side, device=original_sizes.device)

    def inside(length: Tensor, other: Tensor) -> Tensor:
        kept = torch.where(other > length, (length * (side / other)).floor(), side)
        cut = ((side - kept) / 2).floor()[:, None]
        return (cells >= cut) & (cells < side - cut)

    return inside(height, width)[:, :, None] & inside(width, height)[:, None, :]
