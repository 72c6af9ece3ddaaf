"""Operators: thin wrappers with fake kernels and autograd over the compiled library, or over their references.

Every wrapper asks :func:`kernel` for the compiled operator. Where this build has none for the device and dtype, that is
said once and the wrapper computes the reference instead: slower, the same numbers.
"""

import functools
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).parents[1] / "_C.so"
# The floating types that the kernels of a device do not know.
NO_KERNEL = {"cpu": (torch.float16,), "cuda": (torch.float64,)}


@functools.cache
def load_library() -> bool:
    """Load the compiled operators into ``torch.ops.mmoe``; False where that is not possible (announced once)."""
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        reason = str(error) if LIBRARY.exists() else f"{LIBRARY.name} is not built"
        warnings.warn(f"mmoe: operators run as PyTorch references: {reason}", RuntimeWarning, stacklevel=2)
        return False
    return True


def kernel(name: str, data: Tensor) -> Any | None:
    """The compiled operator ``mmoe::name`` for the device and dtype of ``data``, or None (announced once)."""
    return getattr(torch.ops.mmoe, name).default if _has_kernel(name, data.device.type, data.dtype) else None


# torch.compile asks once, while it traces, and keeps the answer; it would trace through a functools.cache.
@torch.compiler.assume_constant_result
def _has_kernel(name: str, device_type: str, dtype: torch.dtype) -> bool:
    return _find_kernel(name, device_type, dtype)


@functools.cache
def _find_kernel(name: str, device_type: str, dtype: torch.dtype) -> bool:
    if not load_library():
        return False
    getattr(torch.ops.mmoe, name)  # a name that the library does not define is a defect and raises here
    key = torch._C._dispatch_key_for_device(device_type)
    present = torch._C._dispatch_has_kernel_for_dispatch_key(f"mmoe::{name}", key)
    if not present or dtype in NO_KERNEL.get(device_type, ()):
        what = f"for {dtype} on {device_type}" if present else f"on {device_type}"
        message = f"mmoe: {name} runs as PyTorch reference {what}: this build has no kernel for it"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
        return False
    return True
