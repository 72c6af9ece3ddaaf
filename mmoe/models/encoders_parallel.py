"""Tensor parallelism of a built ViT: its heads and the columns of its MLPs cut over the ranks, in place.

:func:`shard` after the encoder has its first weights, the same on all ranks; :class:`Encoders` in the place of a plain
``ModuleDict``, so that a distributed checkpoint knows the parts and loads at any other number of ranks. An export does
not ship this file: there the encoder is whole.
"""

import functools
import sys
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor, nn

from mmoe.models.encoders.vit import Block, ViT
from mmoe.parallel import collectives, engine


class EnteringNorm(nn.LayerNorm):
    """What every rank reads whole and computes a part of: the ranks' gradients add up."""

    def __init__(self, whole: nn.LayerNorm, group: Any) -> None:
        super().__init__(list(whole.normalized_shape), whole.eps, device="meta")
        self.weight, self.bias, self.group = whole.weight, whole.bias, group

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return collectives.sum_gradient(super().forward(input), self.group)


class LeavingLinear(nn.Linear):
    """Reads this rank's part of its inputs; the ranks' outputs are summed, the bias is added once."""

    def __init__(self, whole: nn.Linear, group: Any) -> None:
        super().__init__(whole.in_features // group.size(), whole.out_features, device="meta")
        self.weight, self.bias, self.group = _part(whole.weight, 1, group), whole.bias, group

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        summed = reduce_from_tensor_model_parallel_region(F.linear(input, self.weight), self.group)
        return summed + self.bias


class Encoders(nn.ModuleDict):
    """The encoders by name, each of which stands in a distributed checkpoint as the whole one that it is a part of."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        group, state = engine.tensor_group(), {}
        for name, encoder in self.items():
            place = f"{prefix}{name}."
            state |= sharded_state_dict_default(encoder, place, sharded_offsets, metadata, tp_group=group)
            for part, parameter in encoder.named_parameters():
                if getattr(parameter, "tensor_model_parallel", False):
                    key = f"{place}{part}"
                    gated = isinstance(encoder, ViT) and encoder.config.activation == "swiglu" and ".mlp_in." in part
                    state[key] = _shard_of(state[key], parameter, sharded_offsets, gated)
        return state


def shard(encoder: nn.Module) -> bool:
    """Cuts the heads and the MLPs of a ViT over the tensor-parallel ranks, and says whether it did.

    Another encoder stays whole on every rank, as does a ViT whose heads or MLP do not divide, which one rank says once.
    The sums of a rank's gradients over its images are whole as they are: norms, positions and biases have the same on
    every rank, and a part has its own.
    """
    group = engine.tensor_group()
    if group.size() == 1 or not isinstance(encoder, ViT):
        return False
    config, size = encoder.config, group.size()
    if config.heads % size or (config.mlp_width or 4 * config.width) % size:
        _say(
            f"encoder {config.name}: {size} tensor-parallel ranks do not divide its heads or its MLP, each has it whole"
        )
        return False
    for block in encoder.blocks:
        assert isinstance(block, Block)
        block.heads = config.heads // size
        block.attention_norm = EnteringNorm(block.attention_norm, group)
        block.mlp_norm = EnteringNorm(block.mlp_norm, group)
        for linear in (block.query, block.key, block.value):
            _keep_rows(linear, group)
        _keep_rows(block.mlp_in, group, halves=config.activation == "swiglu")
        block.attention_out = LeavingLinear(block.attention_out, group)
        block.mlp_out = LeavingLinear(block.mlp_out, group)
    return True


def whole(encoder: nn.Module) -> dict[str, Tensor]:
    """The weights of an encoder by name, put together of the tensor-parallel ranks' parts; called by all of them."""
    group, state = engine.tensor_group(), {name: tensor.detach() for name, tensor in encoder.state_dict().items()}
    for name, parameter in encoder.named_parameters() if group.size() > 1 else ():
        if getattr(parameter, "tensor_model_parallel", False):
            mine = state[name].contiguous()
            parts = [torch.empty_like(mine) for _ in range(group.size())]
            torch.distributed.all_gather(parts, mine, group=group)
            gated = isinstance(encoder, ViT) and encoder.config.activation == "swiglu" and ".mlp_in." in name
            axis = cast(Any, parameter).partition_dim
            halves = zip(*(part.chunk(2 if gated else 1, axis) for part in parts), strict=True)
            state[name] = torch.cat([part for half in halves for part in half], axis)
    return state


@functools.cache
def _say(line: str) -> None:
    if engine.ranks().first:
        print(line, file=sys.stderr)


def _keep_rows(linear: nn.Linear, group: Any, halves: bool = False) -> None:
    """Leaves the outputs of this rank; ``halves``: of gate and up, which lie one after the other, each."""
    linear.weight = _part(linear.weight, 0, group, halves)
    if linear.bias is not None:
        linear.bias = _part(linear.bias, 0, group, halves)
    linear.out_features //= group.size()


def _part(whole: Tensor, dim: int, group: Any, halves: bool = False) -> nn.Parameter:
    parts = [half.chunk(group.size(), dim)[group.rank()] for half in whole.detach().chunk(2 if halves else 1, dim)]
    mine = nn.Parameter(torch.cat(parts, dim).clone(), requires_grad=whole.requires_grad)
    set_tensor_model_parallel_attributes(mine, True, dim, 1)
    return mine


def _shard_of(whole: Any, parameter: Any, offsets: tuple, gated: bool) -> Any:
    """``parameter`` where it stands in its whole, ``whole`` being how it would stand if every rank had the same."""
    here, front = engine.ranks(), len(offsets)
    axis = parameter.partition_dim
    place = (front + axis, here.tensor_rank, here.tensor_size)
    replica = (0, 0, whole.replica_id[-1])
    part = ShardedTensor.from_rank_offsets(
        whole.key, parameter, *offsets, place, replica_id=replica, prepend_axis_num=front
    )
    return apply_swiglu_sharded_factory(part, offsets) if gated else part
