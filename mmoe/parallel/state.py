"""A model's and an optimizer's state on disk, in a form that loads at any layout (Megatron-Core's torch_dist)."""

import inspect
import itertools
import math
import queue
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmoe.parallel import pickles
from mmoe.parallel.engine import DistributedDataParallel, ranks
from mmoe.parallel.optimizer import MegatronOptimizer, begin_state

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException as CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory, is_main_replica
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


class Place(NamedTuple):
    """Where a tensor of a model stands in the state: in that of ``key``, behind the indices ``leading``."""

    key: str
    leading: tuple[int, ...]
    whole: tuple[int, ...]
    """Shape of all that ``key`` has."""
    tensor: torch.Tensor


def places(model: torch.nn.Module) -> dict[str, Place]:
    """Of every tensor by its name in ``model``, which is whole on one process; it may be on the meta device."""
    found = {}
    for name, part in model.sharded_state_dict().items():  # type: ignore[operator]
        if not isinstance(part, ShardedTensor | ShardedTensorFactory):
            continue
        # A factory cuts a tensor into parts that stand side by side under one key.
        built = list(nested_values(part.build())) if isinstance(part, ShardedTensorFactory) else [part]
        keys = {(s.key, tuple(s.global_offset[: s.prepend_axis_num]), tuple(s.global_shape)) for s in built}
        ((key, leading, whole),) = keys
        assert part.data is not None
        found[name] = Place(key, leading, whole, part.data)
    return found


def objects(model: torch.nn.Module) -> dict[str, Any]:
    """What :func:`sharded` has beside tensors."""
    state = model.sharded_state_dict().items()  # type: ignore[operator]
    kept = {name: part for name, part in state if not isinstance(part, ShardedTensor | ShardedTensorFactory)}
    return dict(zip(_names([model]), [kept], strict=True))


def size(state: dict[str, Any]) -> int:
    """Bytes of the tensors that this rank writes of its :func:`sharded` state: of each the first copy."""
    tensors = (part for part in nested_values(state) if isinstance(part, ShardedTensor))
    mine = (part for part in tensors if is_main_replica(part.replica_id))
    return sum(math.prod(part.local_shape) * part.dtype.itemsize for part in mine)


class Write:
    """The :func:`sharded` state of all ranks on its way into the empty ``folder`` (torch_dist).

    Made by all ranks together, it holds a copy of what this rank writes: what it was made of may change at once. Each
    rank then calls :meth:`run`, from any thread, and all together :meth:`finish`.
    """

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        # Upstream's queue between processes (filesystem_async.py) is a spawned manager, which a SIGTERM to the process
        # group kills: the save that it asks for would then fail.
        filesystem_async._results_queue = queue.Queue()
        # What a factory makes of a tensor may be that tensor under another shape.
        parts = (part for part in nested_values(state) if isinstance(part, ShardedTensor | ShardedTensorFactory))
        live = {part.data.untyped_storage().data_ptr() for part in parts if part.data is not None}
        asked: dict[str, Any] = {"async_sharded_save": True}
        if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
            asked["async_strategy"] = "mcore"  # 0.19.2; its other one is a package of its own
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.request: Any = dist_checkpointing.save(state, str(folder), **asked)
        self.buckets = self.request.preload_fn() if self.request.preload_fn else []
        self.buckets = [
            (path, name, (blobs, [(item, _own(tensor, live)) for item, tensor in tensors]))
            for path, name, (blobs, tensors) in self.buckets
        ]
        self.files = [Path(path) for path, _, _ in self.buckets]
        """What this rank writes."""

    def run(self) -> None:
        """Writes this rank's files and forces them to the disk; an error is raised by :meth:`finish`."""
        if not self.buckets:
            return
        # Upstream's function for this (the partial's own) forks a process for every file: not out of threads.
        (transforms, *_), (_, _, results) = self.request.async_fn.args, self.request.async_fn_args
        write_file: Any = filesystem_async.FileSystemWriterAsync.write_preloaded_data
        done: dict[int, Any] | Exception = {}
        for index, bucket in enumerate(self.buckets):
            result, count = queue.Queue[Any](), queue.Queue[int]()
            count.put(index)
            write_file(
                transforms,
                local_proc_idx=index,
                write_bucket=bucket,
                results_queue=result,
                count_queue=count,
                use_fsync=True,
            )
            written = result.get()[1]
            if isinstance(written, Exception):
                done = written
                break
            done[index] = written
        results.put(done)
        self.buckets = []  # the copy

    def finish(self) -> None:
        """Writes the index, once every rank has :meth:`run`.

        Raises:
            CheckpointException: on all ranks: one of them could not write.
        """
        for function in self.request.finalize_fns:
            function()


def _own(tensor: torch.Tensor, live: set[int]) -> torch.Tensor:
    """``tensor`` as it is now, for a thread; upstream copies views only, and from a device."""
    return tensor.clone() if tensor.untyped_storage().data_ptr() in live else tensor


def load(
    folder: Path,
    models: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    resized: Mapping[str, tuple[tuple[int, ...], Callable[[torch.Tensor], torch.Tensor]]] | None = None,
) -> None:
    """Fills the pipeline chunks ``models`` (and ``optimizer`` and random states, unless None) from ``folder``, saved at
    any layout. Nothing in its files is called.

    resized: of tensors that all ranks of a stage hold whole, the shape that they have in ``folder``, and what makes
    ours of them.

    Raises:
        UserError: they hold something else than data.
    """
    pickles.check(folder)
    target = sharded(models, optimizer, loading=True)
    for name, (key, (shape, _)) in itertools.product(_names(models), (resized or {}).items()):
        if part := target[name].get(key):
            stored = torch.empty(shape, dtype=part.dtype, device=part.data.device)
            target[name][key] = ShardedTensor.from_rank_offsets(part.key, stored, replica_id=part.replica_id)
    with warnings.catch_warnings():
        # dist_checkpointing/strategies/torch.py:799 calls what torch has deprecated, or warns of (0.19.2).
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")
        with pickles.read_as_data(folder):
            state: Any = dist_checkpointing.load(target, str(folder))
    for name, model in zip(_names(models), models, strict=True):
        fitted = {key: fit(state[name][key]) for key, (_, fit) in (resized or {}).items() if key in state[name]}
        _unwrap(model).load_state_dict(state[name] | fitted)
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
        begin_state(optimizer)
        torch.set_rng_state(state["random"])
