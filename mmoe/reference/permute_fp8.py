"""Tokens gathered into expert order and quantised to FP8 by blocks of 1 × 128, in plain PyTorch."""

import torch
from torch import Tensor

from mmoe.reference.permute import gather

BLOCK = 128


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """[M, d] → float8_e4m3fn [M, d] and float32 [M, d/128], the scales to multiply it with."""
    blocks = x.float().unflatten(1, (x.shape[1] // BLOCK, BLOCK))
    amax = blocks.abs().amax(2)
    # As a tensor: a Python number divided by a tensor is rounded twice, as number · (1 / tensor).
    largest = amax.new_tensor(torch.finfo(torch.float8_e4m3fn).max)
    # A scale that is not a normal number would lose the block; what is that small rounds to 0 by itself.
    tiny = amax < largest * torch.finfo(torch.float32).tiny
    scaled = blocks * torch.where(tiny, 1.0, largest / amax)[:, :, None]
    return scaled.flatten(1).to(torch.float8_e4m3fn), torch.where(tiny, 1.0, amax / largest)


def permute_fp8(x: Tensor, row_of_slot: Tensor, slot_of_row: Tensor) -> tuple[Tensor, Tensor]:
    """rows and scales of :func:`mmoe.ops.permute_fp8.permute_fp8`, along an index of ``permute_index``."""
    return quantize(gather(x, row_of_slot, slot_of_row))
