"""The hidden z-loss (LongCat-Flash, arXiv 2509.01322, section 2.3) in plain PyTorch."""

import torch
from torch import Tensor


def hidden_z_loss(z: Tensor, coefficient: float, valid: Tensor | None = None) -> Tensor:
    """Penalty on large activations. Contract: :func:`mmoe.ops.hidden_z_loss.hidden_z_loss`."""
    z = z.to(torch.promote_types(torch.float32, z.dtype))
    squares = z.abs().logsumexp(-1).square()
    if valid is None:
        return coefficient * squares.sum() / max(len(squares), 1)
    return coefficient * squares.masked_fill(~valid, 0).sum() / valid.sum().clamp(min=1)
