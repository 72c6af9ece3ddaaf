"""A model's and an optimizer's state on disk, in a form that loads at any layout (Megatron-Core's torch_dist)."""

import math
import queue
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmoe.parallel import pickles
from mmoe.parallel.engine import DistributedDataParallel, ranks
from mmoe.parallel.optimizer import MegatronOptimizer, begin_state

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async

SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def _unwrap(model: torch.nn.Module) -> Any:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _names(models: Sequence[torch.nn.Module]) -> list[str]:
    """Where each pipeline chunk stands in the state; tensors go by their own names, whatever chunk holds them."""
    return [f"model{index}" for index in range(len(models))]


def sharded(
    models: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None, *, loading: bool = False
) -> dict[str, Any]:
    """This rank's part of the weights, optimizer and random states, and where in the whole it stands. With the
    distributed optimizer all ranks put its state together for this."""
    chunks = [_unwrap(model).sharded_state_dict() for model in models]
    state: dict[str, Any] = dict(zip(_names(models), chunks, strict=True))
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=SHARDING)
        # Every rank draws the same numbers (start() seeds them alike), so one state serves any layout.
        state["random"] = ShardedObject("random", torch.get_rng_state(), (1,), (0,), replica_id=ranks().rank)
    return state


def size(state: dict[str, Any]) -> int:
    """Bytes of the tensors that this rank writes of its :func:`sharded` state: of each the first copy."""
    tensors = (part for part in nested_values(state) if isinstance(part, ShardedTensor))
    mine = (part for part in tensors if is_main_replica(part.replica_id))
    return sum(math.prod(part.local_shape) * part.dtype.itemsize for part in mine)


def save(folder: Path, state: dict[str, Any]) -> None:
    """Writes the :func:`sharded` state of all ranks into the empty ``folder`` (torch_dist)."""
    # A save within this process needs no queue between processes. Upstream's (filesystem_async.py:50) is a spawned
    # manager, which a SIGTERM to the process group kills: the save that it asks for would then fail.
    filesystem_async._results_queue = queue.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        dist_checkpointing.save(state, str(folder))


def load(folder: Path, models: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None) -> None:
    """Fills the pipeline chunks ``models`` (and ``optimizer`` and random states, unless None) from ``folder``, saved at
    any layout. Nothing in its files is called.

    Raises:
        UserError: they hold something else than data.
    """
    pickles.check(folder)
    target = sharded(models, optimizer, loading=True)
    with warnings.catch_warnings():
        # dist_checkpointing/strategies/torch.py:799 calls what torch has deprecated, or warns of (0.19.2).
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")
        with pickles.read_as_data(folder):
            state: Any = dist_checkpointing.load(target, str(folder))
    for name, model in zip(_names(models), models, strict=True):
        _unwrap(model).load_state_dict(state[name])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
        begin_state(optimizer)
        torch.set_rng_state(state["random"])
