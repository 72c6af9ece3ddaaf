"""The only file that knows Megatron-Core's globals: process groups, schedules, gradient reduction, optimizer.

Everything above asks here, so that the differences between Megatron-Core 0.16 and 0.19 and between CPU and CUDA end at
this file and :mod:`mmoe.parallel.cpu_platform`.
"""

import atexit
import logging
import os
import queue
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from mmoe.parallel import cpu_platform
from mmoe.recipe.schema import Optimizer, Parallel

cpu_platform.install()

with warnings.catch_warnings():
    # What is missing and what stands in for it is for `mmoe doctor` to say, not for every import.
    warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (are|is) not installed")
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.optimizer import MegatronOptimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.transformer_config import TransformerConfig

logging.getLogger("megatron.core").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Ranks:
    """Where this process stands."""

    rank: int
    world: int
    data_rank: int
    data_size: int
    expert_rank: int
    expert_size: int

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0


def start(parallel: Parallel, seed: int, timeout_seconds: int = 600) -> Ranks:
    """Joins the process group that torchrun, mpirun or Slurm announced (or one of one rank) and builds the grid.

    Random generators start from ``seed``, the same on every data-parallel rank.
    """
    if not dist.is_initialized():
        world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        store = None if world > 1 else HashStore()
        options: dict[str, Any] = {"store": store, "rank": rank, "world_size": world} if store else {}
        dist.init_process_group(cpu_platform.backend(), timeout=timedelta(seconds=timeout_seconds), **options)
        atexit.register(stop)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    return ranks()


def stop() -> None:
    """Leaves the process groups; safe to call twice."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def ranks() -> Ranks:
    return Ranks(
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_size=parallel_state.get_expert_model_parallel_world_size(),
    )


def expert_group() -> Any:
    """The ranks that share one set of experts."""
    return parallel_state.get_expert_model_parallel_group()


def expert_replica() -> int:
    """Which copy of its experts this rank holds."""
    return parallel_state.get_expert_data_parallel_rank()


def sum_over_data(tensor: torch.Tensor) -> torch.Tensor:
    """Sums ``tensor`` in place over the data-parallel (and context-parallel) ranks and returns it."""
    dist.all_reduce(tensor, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return tensor


def any_rank(condition: bool) -> bool:
    """Whether ``condition`` holds on at least one rank; every rank gets the same answer."""
    flag = torch.tensor([float(condition)], device=cpu_platform.device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def barrier() -> None:
    dist.barrier()


def attach_loss(hidden: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """Returns ``hidden``; its backward also sends ``loss``'s gradient, weighted like one token's loss.

    The schedule sets the scale before each backward, so an auxiliary loss inside a pipeline stage needs no way out.
    """
    return MoEAuxLossAutoScaler.apply(hidden, loss)


def version_settings() -> dict[str, Any]:
    """Configuration that only one of the supported Megatron-Core versions knows."""
    # 0.16: transformer_config.py:784, the default "full" warns that it is deprecated.
    return {"cuda_graph_scope": []} if "cuda_graph_scope" in TransformerConfig.__dataclass_fields__ else {}


def prepare(model: torch.nn.Module, config: TransformerConfig) -> DistributedDataParallel:
    """Wraps ``model`` for gradient reduction over the data-parallel ranks (expert parameters over theirs)."""
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            # At expert-parallel size 1 too: the optimizer state then has one form at every layout.
            setattr(parameter, "allreduce", False)
    wrapped = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=False
        ),
        model,
    )
    wrapped.broadcast_params()
    config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def build_optimizer(
    settings: Optimizer, model: DistributedDataParallel, config: TransformerConfig
) -> MegatronOptimizer:
    """AdamW on fp32 main weights with clipping by the global norm; apex's or TE's fused Adam where installed."""
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.eps,
            clip_grad=settings.clip_grad,
            bf16=config.params_dtype == torch.bfloat16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=False,
        ),
        [model],
    )
    config.grad_scale_func = optimizer.scale_loss
    return optimizer


def forward_backward(
    model: DistributedDataParallel,
    forward_step: Callable[[Iterator[Any], torch.nn.Module], Any],
    batches: Iterator[Any],
    count: int,
    sequence_length: int,
    micro_batch: int,
) -> list[Any]:
    """Runs ``count`` micro-batches forward and backward and reduces the gradients; the loss functions' records."""
    model.zero_grad_buffer()
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches,
        model=model,
        num_microbatches=count,
        seq_length=sequence_length,
        micro_batch_size=micro_batch,
        forward_only=False,
    )


SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def _unwrap(model: torch.nn.Module) -> Any:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _sharded(model: torch.nn.Module, optimizer: MegatronOptimizer | None, loading: bool) -> dict[str, Any]:
    state: dict[str, Any] = {"model": _unwrap(model).sharded_state_dict()}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=loading, metadata=SHARDING)
        # Every rank draws the same numbers (start() seeds them alike), so one state serves any layout.
        state["random"] = ShardedObject("random", torch.get_rng_state(), (1,), (0,), replica_id=ranks().rank)
    return state


def save_state(folder: Path, model: torch.nn.Module, optimizer: MegatronOptimizer) -> None:
    """Writes weights, optimizer and random states of all ranks into the empty ``folder`` (torch_dist)."""
    # A save within this process needs no queue between processes. Upstream's (filesystem_async.py:50) is a spawned
    # manager, which a SIGTERM to the process group kills: the save that it asks for would then fail.
    filesystem_async._results_queue = queue.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        dist_checkpointing.save(_sharded(model, optimizer, loading=False), str(folder))


def load_state(folder: Path, model: torch.nn.Module, optimizer: MegatronOptimizer | None) -> None:
    """Fills ``model`` (and ``optimizer`` and random states, unless None) from ``folder``, saved at any layout."""
    target = _sharded(model, optimizer, loading=True)
    with warnings.catch_warnings():
        # dist_checkpointing/strategies/torch.py:799 calls what torch has deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        state: Any = dist_checkpointing.load(target, str(folder))
    _unwrap(model).load_state_dict(state["model"])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
