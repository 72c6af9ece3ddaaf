"""The hidden z-loss: a penalty on activations so large that bf16 would lose them."""

from typing import Any

import torch
from torch import Tensor

from mmoe.ops import check, kernel, load_library
from mmoe.reference import hidden_z_loss as reference

__all__ = ["hidden_z_loss"]


def hidden_z_loss(z: Tensor, coefficient: float, *, valid: Tensor | None = None) -> Tensor:
    """coefficient · mean over tokens of (log Σ_i exp|z_i|)², LongCat-Flash's hidden z-loss (arXiv 2509.01322).

    Args:
        z: [T, d], floating, d ≥ 1: the last hidden state before the final norm. T may be 0. Takes gradient.
        coefficient: λ, about 1e-7.
        valid: [T] bool or None. A False token (padding) is left out of the mean and gets no gradient.

    Returns:
        scalar float32 (float64 for float64 ``z``); 0 where no token counts.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    check.ndim("z", z, 2)
    check.floating("z", z)
    if z.shape[1] == 0:
        raise ValueError(f"z has shape {tuple(z.shape)}, must have at least one column")
    check.one_device(z=z, valid=valid)
    if valid is not None:
        check.shape("valid", valid, z.shape[:1])
        check.boolean("valid", valid)
    compiled = kernel("hidden_z_loss", z)
    return compiled(z, valid, coefficient)[0] if compiled else reference.hidden_z_loss(z, coefficient, valid)


def _fake(z: Tensor, valid: Tensor | None, coefficient: float) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(torch.float32, z.dtype)
    return z.new_empty((), dtype=dtype), z.new_empty(z.shape[0], dtype=dtype), z.new_empty((), dtype=dtype)


def _fake_backward(grad_loss: Tensor, z: Tensor, lse: Tensor, count: Tensor, coefficient: float) -> Tensor:
    return z.new_empty(z.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    z, _, ctx.coefficient = inputs
    _, lse, count = output
    ctx.mark_non_differentiable(lse, count)
    ctx.save_for_backward(z, lse, count)


def _backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor, None, None]:
    return torch.ops.mmoe.hidden_z_loss_backward(grad_loss, *ctx.saved_tensors, ctx.coefficient), None, None


if load_library():
    torch.library.register_fake("mmoe::hidden_z_loss", _fake)
    torch.library.register_fake("mmoe::hidden_z_loss_backward", _fake_backward)
    torch.library.register_autograd("mmoe::hidden_z_loss", _backward, setup_context=_setup_context)
