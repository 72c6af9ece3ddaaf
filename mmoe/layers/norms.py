"""Root-mean-square norm that Megatron can build anywhere."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from mmoe.parallel.engine import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """y = scale · w · x / √(mean(x²) + eps), over the last dimension.

    Megatron's WrappedTorchNorm refuses sequence parallelism; here the weight is tagged for its gradient reduction.
    ``scale`` is a constant factor, LongCat's √(d/rank) behind the latent norms of MLA; it is no parameter.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, scale: float = 1.0, **_: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.scale = scale
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.scale == 1.0 else self.weight * self.scale
        return self.norm(x, weight)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, self.normalized_shape, weight, self.eps)


class ApexRMSNorm(RMSNorm):
    """The same by apex's fused kernel (apex/normalization/fused_layer_norm.py, fused_rms_norm_affine); CUDA only."""

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        fused = import_module("apex.normalization.fused_layer_norm").fused_rms_norm_affine
        return fused(x, weight, self.normalized_shape, eps=self.eps)
