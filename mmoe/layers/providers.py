"""Whose linears, norms and grouped GEMM the backbone is made of: ours on Megatron-Core and torch, Transformer Engine's,
or apex's norm. Parameters have the same names and shapes whatever is chosen.

Ours are Megatron-Core's parallel linears, torch's rms_norm and the grouped linear of :mod:`mmoe.ops.grouped_linear`; in
FP8 the same linears and a grouped GEMM with the emulated arithmetic of :mod:`mmoe.layers.fp8`. Dispatch is always ours:
Transformer Engine's fused permute returns its empty input for zeros where all tokens of a rank chose zero experts (2.8,
pytorch/permutation.py, _moe_unpermute_mask_map.forward and _moe_permute_mask_map.backward), and knows no identity
weight.

Written against Transformer Engine 2.8 and apex of 2025; neither was run here.
"""

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor

from mmoe.layers import fp8
from mmoe.layers.modules import ReplicatedLinear
from mmoe.layers.norms import ApexRMSNorm, RMSNorm
from mmoe.ops import grouped_linear as ops
from mmoe.parallel import engine
from mmoe.parallel.collectives import sum_gradient

if TYPE_CHECKING:
    from mmoe.layers.config import LanguageConfig

GroupedLinear = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows [R, K] by expert, weight [n, …, K], ends int32 [n]) → [R, N], as mmoe.ops.grouped_linear."""


class _Fp8ParallelLinear(torch.nn.Module):
    """Megatron's linear with its collectives around our FP8 GEMMs; ``kind`` is what they are counted as."""

    kind = "mlp"

    def __init__(self, *args: Any, config: "LanguageConfig", **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)  # Megatron's, which comes next in the order of resolution
        self.fp8 = fp8.make_scaling(config.choice.fp8, config.precision.fp8_amax_history)

    def _forward_impl(
        self, *, weight: Tensor, allreduce_dgrad: bool, sequence_parallel: bool, tp_group: Any, **others: Any
    ) -> Tensor:
        """In place of LinearWithGradAccumulationAndAsyncCommunication (tensor_parallel/layers.py:443)."""
        x = others["input"]
        if sequence_parallel:
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            x = sum_gradient(x, tp_group)
        return fp8.linear(x, weight, self.fp8, self.kind)


class Fp8ColumnParallelLinear(_Fp8ParallelLinear, ColumnParallelLinear):
    pass


class Fp8RowParallelLinear(_Fp8ParallelLinear, RowParallelLinear):
    pass


class Fp8ReplicatedLinear(ReplicatedLinear):
    def __init__(self, config: "LanguageConfig", inputs: int, outputs: int, kind: str) -> None:
        super().__init__(config, inputs, outputs)
        self.kind = kind
        self.fp8 = fp8.make_scaling(config.choice.fp8, config.precision.fp8_amax_history)

    def forward(self, x: Tensor) -> Tensor:
        return fp8.linear(x, self.weight, self.fp8, self.kind)


class Fp8GroupedLinear(torch.nn.Module):
    def __init__(self, config: "LanguageConfig", experts: int) -> None:
        super().__init__()
        self.fp8 = fp8.make_scaling(config.choice.fp8, config.precision.fp8_amax_history, experts)

    def forward(self, rows_RK: Tensor, weight: Tensor, ends_n: Tensor) -> Tensor:
        return fp8.grouped_linear(rows_RK, weight.flatten(1, -2), ends_n, self.fp8, "experts")

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Delayed scales, an expert each."""
        here, axis = engine.ranks(), len(sharded_offsets)
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                tensor,
                *sharded_offsets,
                (axis, here.expert_rank, here.expert_size),
                replica_id=(0, here.expert_tensor_rank, engine.expert_replica()),
                prepend_axis_num=axis,
            )
            for name, tensor in self.state_dict().items()
        }


def column(config: "LanguageConfig", inputs: int, outputs: int, kind: str) -> Any:
    """Outputs cut over the tensor-parallel ranks; called with [t, b, inputs], it returns ([…, outputs], None)."""
    linear = _parallel_linears(config)[0](
        inputs,
        outputs,
        config=config,
        init_method=config.init_method,
        gather_output=False,
        bias=False,
        skip_bias_add=True,
        is_expert=False,
    )
    linear.kind = kind
    return linear


def row(config: "LanguageConfig", inputs: int, outputs: int, kind: str) -> Any:
    """Inputs cut over the tensor-parallel ranks, their products summed; returns ([t, b, outputs], None)."""
    linear = _parallel_linears(config)[1](
        inputs,
        outputs,
        config=config,
        init_method=config.output_layer_init_method,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=True,
        is_expert=False,
    )
    linear.kind = kind
    return linear


def mlp(config: "LanguageConfig", group: Any) -> MLP:
    """Megatron's gated MLP over ``group``; its GEMMs count as "mlp"."""
    first, second = _parallel_linears(config)
    parts = MLPSubmodules(linear_fc1=first, linear_fc2=second)
    return MLP(config, parts, ffn_hidden_size=config.ffn_hidden_size, tp_group=group)


def _parallel_linears(config: "LanguageConfig") -> tuple[Any, Any]:
    if config.choice.transformer_engine:
        upstream = import_module("megatron.core.extensions.transformer_engine")
        return upstream.TEColumnParallelLinear, upstream.TERowParallelLinear
    if config.choice.emulates:
        return Fp8ColumnParallelLinear, Fp8RowParallelLinear
    return ColumnParallelLinear, RowParallelLinear


def replicated(config: "LanguageConfig", inputs: int, outputs: int, kind: str) -> torch.nn.Module:
    """The same on all tensor-parallel ranks: [t, b, inputs] → [t, b, outputs]."""
    if config.choice.emulates:
        return Fp8ReplicatedLinear(config, inputs, outputs, kind)
    if not config.choice.transformer_engine:
        return ReplicatedLinear(config, inputs, outputs)
    upstream = import_module("megatron.core.extensions.transformer_engine")
    linear = _one_output(upstream.TELinear)
    return (linear if config.choice.fp8 == "delayed" else _stateless(linear))(
        inputs,
        outputs,
        parallel_mode="duplicated",
        config=config,
        init_method=config.init_method,
        bias=False,
        skip_bias_add=True,
        skip_weight_param_allocation=False,
    )


@lru_cache
def _stateless(upstream: type) -> type:
    """``upstream`` without Transformer Engine's extra state, which our modules have not: keys in a checkpoint agree.
    Only delayed scaling keeps anything in it."""
    plain = torch.nn.Module
    return type(
        upstream.__name__,
        (upstream,),
        {"get_extra_state": plain.get_extra_state, "set_extra_state": plain.set_extra_state},
    )


@lru_cache
def _one_output(upstream: type) -> type:
    """Megatron's TELinear returns (output, None)."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return upstream.forward(self, x)[0]  # type: ignore[attr-defined]

    return type("TEReplicatedLinear", (upstream,), {"forward": forward})


class Norm:
    """Builds the chosen norm; a class, like Megatron's TENorm, because a spec has to be one."""

    def __new__(
        cls, config: "LanguageConfig", hidden_size: int, eps: float = 1e-5, scale: float = 1.0, **_: Any
    ) -> torch.nn.Module:
        # Transformer Engine's has no constant factor: the latent norms of MLA stay ours.
        if config.choice.transformer_engine and scale == 1.0:
            norm = import_module("megatron.core.extensions.transformer_engine").TENorm(config, hidden_size, eps)
            norm.__class__ = _stateless(type(norm))
            return norm
        return (ApexRMSNorm if config.choice.apex_norms else RMSNorm)(config, hidden_size, eps, scale)


def grouped_linear(config: "LanguageConfig", experts: int, inputs: int, outputs: int) -> GroupedLinear:
    """The grouped GEMM of ``experts`` experts; a module where it has a state."""
    if config.choice.emulates:
        return Fp8GroupedLinear(config, experts)
    if config.choice.transformer_engine:
        kind = TEDelayedGroupedLinear if config.choice.fp8 == "delayed" else TEGroupedLinear
        return kind(config, experts, inputs, outputs)
    return local_grouped_linear


def local_grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Gradients straight to where Megatron-Core gathers them, where it gathers them in the weight's dtype."""
    return ops.grouped_linear(rows, weight, ends, into_main_grad=True)


class TEGroupedLinear(torch.nn.Module):
    """Transformer Engine's GroupedLinear on the experts' stacked weight, which stays the caller's parameter.

    Upstream's own are called weight0, weight1, … (2.8, pytorch/module/grouped_linear.py, GroupedLinear.__init__), so
    its module is no child of this one. The numbers of rows go to the host; in FP8 each expert's rows are padded, as in
    Megatron's TEGroupedMLP (moe/experts.py).
    """

    def __init__(self, config: "LanguageConfig", experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        upstream = import_module("transformer_engine.pytorch")
        linear = _stacked(upstream.GroupedLinear)(
            experts, inputs, outputs, bias=False, params_dtype=config.params_dtype, device="meta"
        )
        for expert in range(experts):
            delattr(linear, f"weight{expert}")
        self.upstream = (linear,)
        self.padding = self.unpadding = None
        if config.choice.fp8 != "none":
            self.padding, self.unpadding = upstream.Fp8Padding(experts), upstream.Fp8Unpadding(experts)

    def forward(self, rows_RK: Tensor, weight: Tensor, ends_n: Tensor) -> Tensor:
        (linear,) = self.upstream
        linear.train(self.training)
        linear.stacked = weight.flatten(1, -2)
        # forward() asks its first parameter for the device.
        linear.weight0 = torch.nn.Parameter(linear.stacked[0].detach(), requires_grad=False)
        sizes = ends_n.diff(prepend=ends_n.new_zeros(1)).tolist()
        if self.padding is None or self.unpadding is None:
            return linear(rows_RK, sizes)
        padded, padded_sizes = self.padding(rows_RK, sizes)
        return self.unpadding(linear(padded, padded_sizes), sizes)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        return {}


class TEDelayedGroupedLinear(TEGroupedLinear):
    """With the scales of all this rank's experts as its extra state."""

    def get_extra_state(self) -> Any:
        return self.upstream[0].get_extra_state()

    def set_extra_state(self, state: Any) -> None:
        self.upstream[0].set_extra_state(state)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """One object a rank: it loads at the expert-parallel size that wrote it."""
        here, name = engine.ranks(), f"{prefix}_extra_state"
        places, sizes = [here.expert_rank], [here.expert_size]
        for _, place, size in sharded_offsets:
            places.append(place)
            sizes.append(size)
        replica = (0, here.expert_tensor_rank, engine.expert_replica())
        return {name: ShardedObject(name, self.get_extra_state(), tuple(sizes), tuple(places), replica)}


@lru_cache
def _stacked(upstream: type) -> type:
    """GroupedLinear with the slices of ``stacked`` as its weights; autograd stacks their gradients again."""

    def weights(self: Any) -> list[Tensor]:
        return list(self.stacked.unbind())

    return type("StackedGroupedLinear", (upstream,), {"_get_weight_tensors": weights})
