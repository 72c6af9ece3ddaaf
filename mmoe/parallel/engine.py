"""The only file that knows Megatron-Core's globals: process groups, schedules, gradient reduction.

Everything above asks here, so that the differences between Megatron-Core 0.16 and 0.19 and between CPU and CUDA end in
this package. Its other modules import this one first: it prepares torch for the import of Megatron-Core.
"""

import atexit
import gc
import importlib
import logging
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed import distributed_c10d

from mmoe.parallel import calls, cpu_platform, watchdog
from mmoe.parallel.launch import announced, device_index
from mmoe.recipe.schema import Parallel

cpu_platform.install()
calls.install()

with warnings.catch_warnings():
    # What is missing and what stands in for it is for `mmoe doctor` to say, not for every import.
    warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (are|is) not installed")
    warnings.filterwarnings("ignore", message="MimoModelConfig is experimental")
    for name in ("backends", "mimo"):
        # They warn when they are imported, which what we use does late.
        importlib.import_module(f"megatron.core.models.{name}")
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer.optimizer import MegatronOptimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.transformer_config import TransformerConfig

logging.getLogger("megatron.core").setLevel(logging.ERROR)
# Its MoE layer needs sequence parallelism beside tensor parallelism; ours cuts the tokens itself (layers/moe.py).
warnings.filterwarnings("ignore", message="When using expert parallelism and tensor parallelism for training, sequence")
# Collectives that Megatron-Core calls by their old names, and its look for gradients in two places (optimizer.py:66).
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf", module="megatron")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands in the grid."""

    rank: int
    world: int
    data_rank: int
    data_size: int
    tensor_rank: int
    tensor_size: int
    context_rank: int
    context_size: int
    pipeline_rank: int
    pipeline_size: int
    expert_rank: int
    expert_size: int
    expert_tensor_rank: int
    expert_tensor_size: int

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    @property
    def has_losses(self) -> bool:
        """Whether this rank's losses are counted: the last stage has them, on all its tensor-parallel ranks alike."""
        return self.pipeline_rank == self.pipeline_size - 1 and self.tensor_rank == 0

    @property
    def has_batch(self) -> bool:
        """Whether this rank speaks for its micro-batches, which the ranks of a data-parallel replica all read."""
        return self.has_losses and self.context_rank == 0


def join(
    parallel: Parallel, *, alone: bool = False, timeout_seconds: int = 600, stall_warning_seconds: float = 30.0
) -> None:
    """Joins the process group that the launcher announced, or one of this process ``alone``; does nothing where this
    process is in one. A collective that a rank waits for longer than ``stall_warning_seconds`` is named
    (:mod:`mmoe.parallel.watchdog`)."""
    if parallel.tensor > 1:
        # Megatron's linears launch a collective and count on the kernel behind it not to overtake it on the GPU.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if dist.is_initialized():
        return
    rank, world = (0, 1) if alone else announced()
    if torch.cuda.is_available():
        # cuBLAS is deterministic only with a workspace of its own, chosen before the first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.cuda.set_device(device_index(torch.cuda.device_count()))
    store = None if world > 1 else HashStore()
    options: dict[str, Any] = {"store": store, "rank": rank, "world_size": world} if store else {}
    dist.init_process_group(cpu_platform.backend(), timeout=timedelta(seconds=timeout_seconds), **options)
    watchdog.start(stall_warning_seconds, cpu_platform.backend() == "gloo", timeout_seconds)
    atexit.register(stop)


def start(parallel: Parallel, seed: int, *, alone: bool = False) -> Ranks:
    """Builds the grid, in the process group that :func:`join` joins if this process is in none.

    Called again, it leaves the grid as it is where the sizes are the same, and else ends its groups. Random generators
    start from ``seed``, the same on every data-parallel rank.
    """
    join(parallel, alone=alone)
    sizes = {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
    }
    # A grid of the same sizes stays: models of this process may still use its groups.
    if sizes != _grid.sizes or not parallel_state.model_parallel_is_initialized():
        _leave_grid()
        before = set(distributed_c10d._world.pg_map)
        parallel_state.initialize_model_parallel(**sizes)
        _grid.sizes, _grid.groups = sizes, list(set(distributed_c10d._world.pg_map) - before)
    # moe_utils.py:286 copies every later scale into the first one, of whatever shape another model left it.
    MoEAuxLossAutoScaler.main_loss_backward_scale = None  # type: ignore[assignment]
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    return ranks()


@dataclass
class _Grid:
    """What Megatron-Core's process groups are at present."""

    sizes: dict[str, int | None] = field(default_factory=dict)
    groups: list[Any] = field(default_factory=list)


_grid = _Grid()


def _leave_grid() -> None:
    """Ends the groups of the grid that was. Upstream's destroy_model_parallel only forgets them: gloo's keep their
    threads and connections then, in which a process that changes its layout often drowns."""
    if not parallel_state.model_parallel_is_initialized():
        return
    parallel_state.destroy_model_parallel()
    gc.collect()  # models and optimizers in cycles hold groups too
    for group in _grid.groups:
        if group in distributed_c10d._world.pg_map:  # upstream ends some of them
            dist.destroy_process_group(group)
    _grid.groups, _grid.sizes = [], {}


def stop() -> None:
    """Leaves the process groups; safe to call twice."""
    watchdog.stop()
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        _grid.groups, _grid.sizes = [], {}


def ranks() -> Ranks:
    return Ranks(
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_rank=parallel_state.get_expert_tensor_parallel_rank() or 0,
        expert_tensor_size=parallel_state.get_expert_tensor_parallel_world_size() or 1,
    )


def tensor_group() -> Any:
    """The ranks that share each matrix of the dense layers."""
    return parallel_state.get_tensor_model_parallel_group()


def context_group() -> Any:
    """The ranks that share each pack."""
    return parallel_state.get_context_parallel_group()


def micro_batch_group() -> Any:
    """The ranks that route different tokens of the same micro-batch."""
    return parallel_state.get_tensor_and_context_parallel_group()


def expert_group() -> Any:
    """The ranks that share one set of experts, expert-parallel rank by rank and in each its expert-tensor-parallel
    ranks (the order "tp-cp-ep-dp-pp", parallel_state.py:562)."""
    return parallel_state.get_expert_tensor_and_model_parallel_group()


def expert_replica() -> int:
    """Which copy of its experts this rank holds."""
    return parallel_state.get_expert_data_parallel_rank()


def stages() -> list[int | None]:
    """The virtual pipeline stages whose layers this rank holds; one None without virtual pipelining."""
    size = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    return [None] if size is None else list(range(size))


def is_first_stage(virtual: int | None) -> bool:
    return parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual)


def is_last_stage(virtual: int | None) -> bool:
    return parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual)


def sum_over_world(tensor: torch.Tensor) -> torch.Tensor:
    """Sums ``tensor`` in place over all ranks and returns it."""
    dist.all_reduce(tensor)
    return tensor


def all_true(value: bool) -> bool:
    """Whether ``value`` is True on every rank."""
    least = torch.tensor(float(value), device=cpu_platform.device())
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return bool(least)


def max_over_replicas(tensor: torch.Tensor, *, expert: bool = False) -> torch.Tensor:
    """The maximum, in place, over the ranks that compute with the same weights or with slices of them; with ``expert``
    with those of experts."""
    if expert:
        groups = [
            parallel_state.get_expert_data_parallel_group(),
            parallel_state.get_expert_tensor_parallel_group(),
        ]
    else:
        groups = [parallel_state.get_amax_reduction_group(with_context_parallel=True)]
    for group in groups:
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group)
    return tensor


def from_first(value: Any) -> Any:
    """``value`` as the first rank has it, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, device=cpu_platform.device())
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every rank's ``value``, by rank, on every rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def barrier() -> None:
    dist.barrier()


def attach_loss(hidden: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """Returns ``hidden``; its backward also sends ``loss``'s gradient, weighted like one token's loss.

    The schedule sets the scale before each backward, so an auxiliary loss inside a pipeline stage needs no way out.
    """
    return MoEAuxLossAutoScaler.apply(hidden, loss)


def recompute(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """function(*inputs), whose activations are computed again in the backward instead of kept."""
    return tensor_parallel.checkpoint(function, False, *inputs)


def version_settings() -> dict[str, Any]:
    """Configuration that the supported Megatron-Core versions name differently."""
    # 0.16.1: transformer_config.py:784, the default "full" warns that it is deprecated. 0.19.2 has another name for it.
    names = ("cuda_graph_modules", "cuda_graph_scope")
    return {next(name for name in names if name in TransformerConfig.__dataclass_fields__): []}


def prepare(
    models: Sequence[torch.nn.Module], config: TransformerConfig, *, distributed_optimizer: bool
) -> list[DistributedDataParallel]:
    """Moves this rank's pipeline chunks to the device and wraps them for gradient reduction over the data-parallel
    ranks (expert parameters over theirs); with ``distributed_optimizer`` each rank keeps a shard of the sums."""
    wrapped = []
    for model in models:
        model.to(cpu_platform.device())
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                # At expert-parallel size 1 too: the optimizer state then has one form at every layout.
                setattr(parameter, "allreduce", False)
                # Every rank's experts are its own part of the norm, on whichever tensor-parallel rank they lie
                # (tensor_parallel/layers.py:89 would count the first rank's alone).
                setattr(parameter, "tensor_model_parallel", True)
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=distributed_optimizer
        )
        wrapped.append(DistributedDataParallel(config, settings, model))
        wrapped[-1].broadcast_params()
    config.finalize_model_grads_func = finalize_model_grads
    return wrapped


class _Replay:
    """The same micro-batches for several pipeline chunks, each of which reads them at its own pace."""

    def __init__(self, batches: Iterator[Any], readers: int) -> None:
        self.batches, self.kept = batches, [deque[Any]() for _ in range(readers)]

    def reader(self, index: int) -> Iterator[Any]:
        while True:
            if not self.kept[index]:
                batch = next(self.batches)
                for queue in self.kept:
                    queue.append(batch)
            yield self.kept[index].popleft()


def forward_backward(
    models: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    forward_step: Callable[[Iterator[Any], torch.nn.Module], Any],
    batches: Iterator[Any],
    count: int,
    sequence_length: int,
    micro_batch: int,
) -> list[Any]:
    """Runs ``count`` micro-batches forward and backward through all pipeline stages and reduces the gradients.

    Returns the loss functions' records on the last stage, nothing elsewhere.
    """
    for model in models:
        model.zero_grad_buffer()
    # The optimizer's gradients are the reduction buffers: left in place, the next backward would add to them twice.
    optimizer.zero_grad()
    replay = _Replay(batches, len(models))
    readers = [replay.reader(index) for index in range(len(models))]
    chunks: Any = models if len(models) > 1 else models[0]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=readers if len(models) > 1 else readers[0],
        model=chunks,
        num_microbatches=count,
        seq_length=sequence_length,
        micro_batch_size=micro_batch,
        forward_only=False,
    )
