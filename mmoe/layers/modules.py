"""Small pieces that several layers are built of."""

import torch
from megatron.core.transformer.utils import sharded_state_dict_default

from mmoe.parallel import engine
from mmoe.parallel.engine import TransformerConfig


class ReplicatedLinear(torch.nn.Linear):
    """A linear map without bias that every tensor-parallel rank holds whole."""

    def __init__(self, config: TransformerConfig, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)


class ShardedList(torch.nn.ModuleList):
    """A ModuleList whose members keep their own sharding in a distributed checkpoint."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        state: dict = {}
        for name, module in self.named_children():
            place, group = f"{prefix}{name}.", engine.tensor_group()
            state.update(sharded_state_dict_default(module, place, sharded_offsets, metadata, tp_group=group))
        return state
