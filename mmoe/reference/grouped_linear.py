"""Rows sorted by expert, each times its expert's weight, in plain PyTorch."""

import torch
from torch import Tensor


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The experts one after another. Contract: :func:`mmoe.ops.grouped_linear.grouped_linear`."""
    matrices = weight.flatten(1, -2)
    begin, parts = 0, []
    for matrix, end in zip(matrices, ends.tolist(), strict=True):
        parts.append(rows[begin:end] @ matrix.t())
        begin = end
    parts.append(rows.new_zeros(len(rows) - begin, matrices.shape[1]))
    return torch.cat(parts)
