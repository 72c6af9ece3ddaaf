"""The arguments of the compiled operator sva, which its tests on the CPU and on the emulator draw."""

from typing import NamedTuple

import torch
from torch import Tensor


class Core(NamedTuple):
    """In the order of the schema, but for eps."""

    q: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    features: list[Tensor]
    positions: list[Tensor]
    absorbed: list[Tensor]
    constants: list[Tensor]
    masks: list[Tensor]

    def map(self, function) -> "Core":
        return Core(function(self.q), *([function(part) for part in parts] for parts in self[1:]))

    def exact(self) -> "Core":
        return self.map(lambda tensor: tensor if tensor.dtype == torch.bool else tensor.double())

    def leaves(self) -> list[Tensor]:
        return [self.q, *self.keys, *self.values, *self.features, *self.absorbed, *self.constants]
