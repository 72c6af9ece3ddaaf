"""A model and its optimizer in fp64, where the rounding of sums is what a test has to leave out."""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mmoe.layers import config, fp8
from mmoe.models.multimodal import MultimodalModel
from mmoe.parallel import engine


def _multiply(a: fp8.Scaled, b: fp8.Scaled, ends: Tensor | None) -> Tensor:
    """:func:`mmoe.layers.fp8.multiply`, summed in fp64; torch has no grouped product of that dtype."""
    left, right = a.dequantised(), b.dequantised()
    if ends is None:
        return left @ right
    groups = [slice(begin, end) for begin, end in itertools.pairwise((0, *ends.tolist()))]
    if right.dim() == 3:
        return torch.cat([left[rows] @ matrix for rows, matrix in zip(groups, right, strict=True)])
    return torch.stack([left[:, rows] @ right[rows] for rows in groups])


@contextmanager
def instead_of_float32() -> Iterator[None]:
    """Makes fp64 what a recipe calls fp32, and of whatever is converted to fp32 on the way; FP8 numbers stay FP8."""
    plain = engine.DistributedDataParallelConfig

    def sums_in_own_dtype(**settings: Any) -> Any:
        return plain(**settings | {"grad_reduce_in_fp32": False})

    with ExitStack() as patches:
        patches.enter_context(mock.patch.dict(config.DTYPES, fp32=torch.float64))
        patches.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        patches.enter_context(mock.patch.object(fp8, "multiply", _multiply))
        patches.enter_context(mock.patch.object(engine, "DistributedDataParallelConfig", sums_in_own_dtype))
        yield


def convert(models: list[MultimodalModel]) -> list[MultimodalModel]:
    """What is made in fp32 whatever the recipe says: routers, encoders, scales."""
    return [model.double() for model in models]


def convert_batch(batch: dict[str, Any]) -> dict[str, Any]:
    images = {size: pixels.double() for size, pixels in batch["images"].items()}
    return batch | {"images": images, "loss_mask": batch["loss_mask"].double()}
