"""Operators: thin wrappers with fake kernels and autograd over the compiled library, or over their references.

Every wrapper asks :func:`kernel` for the compiled operator. Where this build has none for the device, that is said once
and the wrapper computes the reference instead: slower, the same numbers.
"""

import functools
import warnings
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).parents[1] / "_C.so"


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


def kernel(name: str, device_type: str) -> Any | None:
    """The compiled operator ``mmoe::name`` for tensors on ``device_type``, or None (announced once)."""
    return getattr(torch.ops.mmoe, name).default if _has_kernel(name, device_type) else None


# torch.compile asks once, while it traces, and keeps the answer; it would trace through a functools.cache.
@torch.compiler.assume_constant_result
def _has_kernel(name: str, device_type: str) -> bool:
    return _find_kernel(name, device_type)


@functools.cache
def _find_kernel(name: str, device_type: str) -> bool:
    if not load_library():
        return False
    getattr(torch.ops.mmoe, name)  # a name that the library does not define is a defect and raises here
    key = torch._C._dispatch_key_for_device(device_type)
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"mmoe::{name}", key):
        message = f"mmoe: {name} runs as PyTorch reference on {device_type}: this build has no kernel for it"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
        return False
    return True
