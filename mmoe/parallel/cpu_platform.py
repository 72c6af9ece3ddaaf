"""Lets Megatron-Core run on a torch without CUDA, over gloo. Does nothing where CUDA is there.

Megatron-Core asks ``torch.cuda`` for devices, streams and random states without asking whether there is a GPU.
:func:`install` must run before Megatron is imported: it answers those calls from the CPU. Each answer names the
upstream lines that it is for (of 0.16.1); ``tests/parallel/test_cpu_platform.py`` fails when one is no longer needed.
"""

import contextlib
import functools
import importlib.util
import os
import sys
import types
from typing import Any

import torch
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "_Event") -> float:
        return 0.0


class _Stream:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or _Event()


def _constant(value: Any) -> Any:
    return lambda *args, **kwargs: value


def _answer_cuda_calls() -> None:
    """distributed/param_and_grad_buffer.py:783, distributed_data_parallel.py:230, tensor_parallel/random.py:43."""
    cuda = torch.cuda
    stream = _Stream()
    answers = {
        "current_device": CPU,
        "device_count": 1,
        "get_device_capability": (0, 0),
        "synchronize": None,
        "set_device": None,
        "empty_cache": None,
        "current_stream": stream,
        "default_stream": stream,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
    }
    for name, value in answers.items():
        setattr(cuda, name, _constant(value))
    setattr(cuda, "Stream", _Stream)
    setattr(cuda, "Event", _Event)
    setattr(cuda, "stream", lambda stream: contextlib.nullcontext())
    setattr(cuda, "device", lambda device: contextlib.nullcontext())
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, _constant(None))

    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    for module in (cuda, cuda.random):
        setattr(module, "get_rng_state", get_rng_state)
        setattr(module, "set_rng_state", set_rng_state)
        setattr(module, "manual_seed", manual_seed)
    setattr(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    setattr(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)


def _names_cuda(device: Any) -> bool:
    return str(device).startswith("cuda") if device is not None else False


def _redirect_factories() -> None:
    """Literal ``device="cuda"``: pipeline_parallel/schedules.py:596, optimizer/optimizer.py:907, clip_grads.py:90."""

    def on_cpu(factory: Any) -> Any:
        @functools.wraps(factory)
        def create(*args: Any, **kwargs: Any) -> Any:
            if _names_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            return factory(*args, **kwargs)

        return create

    # `with torch.device(…)` knows the factories by identity, in a set made on first use: it has to hold the originals.
    _device_constructors()
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "empty_like"):
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _answer_type_strings() -> None:
    """optimizer/optimizer.py:690 sorts parameters by ``param.type() == 'torch.cuda.FloatTensor'``."""
    plain = torch.Tensor.type

    def type_of(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain(self, *args, **kwargs)
        asks_megatron = f"{os.sep}megatron{os.sep}core{os.sep}optimizer{os.sep}" in sys._getframe(1).f_code.co_filename
        if asks_megatron and not args and not kwargs:
            return answer.replace("torch.", "torch.cuda.")
        return answer

    setattr(torch.Tensor, "type", type_of)


def _stand_in_for_triton() -> None:
    """0.19.2: transformer/moe/ops/paged_stash.py:4 imports triton unguarded."""
    if importlib.util.find_spec("triton") is None:
        name = "megatron.core.transformer.moe.ops.paged_stash"
        module = types.ModuleType(name)
        setattr(
            module, "__getattr__", lambda attribute: None if not attribute.startswith("__") else _missing(attribute)
        )
        sys.modules[name] = module


def _missing(attribute: str) -> None:
    raise AttributeError(attribute)


_installed = False


def install() -> None:
    """Prepares torch for the import of Megatron-Core. Idempotent; nothing on a machine with CUDA."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    # jit_fuser (megatron/core/jit.py) would compile for seconds on the first step.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    _answer_cuda_calls()
    _redirect_factories()
    _answer_type_strings()
    _stand_in_for_triton()


def device() -> torch.device:
    """The device that the model and its batches live on."""
    return torch.device("cuda", torch.cuda.current_device()) if not _installed else CPU


def backend() -> str:
    """The name of the process groups' backend."""
    return "nccl" if torch.cuda.is_available() else "gloo"
