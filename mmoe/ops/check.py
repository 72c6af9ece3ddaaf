"""Checks shared by the operators: of shapes and types alone, never of data, so they cost no synchronisation."""

from collections.abc import Sequence

import torch
from torch import Tensor


def one_device(**arguments: Tensor | None) -> None:
    """All on the device of the first."""
    given = [(name, tensor.device) for name, tensor in arguments.items() if tensor is not None]
    first, wanted = given[0]
    for name, device in given[1:]:
        if device != wanted:
            raise ValueError(f"{name} is on {device}, must be on {wanted} as {first} is")


def ndim(name: str, tensor: Tensor, wanted: int) -> None:
    if tensor.ndim != wanted:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must have {wanted} dimensions")


def shape(name: str, tensor: Tensor, wanted: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(wanted):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be {tuple(wanted)}")


def dtype(name: str, tensor: Tensor, wanted: torch.dtype) -> None:
    if tensor.dtype != wanted:
        raise TypeError(f"{name} is {tensor.dtype}, must be {wanted}")


def floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} is {tensor.dtype}, must be a floating type")


def integer(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} is {tensor.dtype}, must be int32 or int64")


def boolean(name: str, tensor: Tensor) -> None:
    dtype(name, tensor, torch.bool)


def choice(name: str, value: str, wanted: Sequence[str]) -> None:
    if value not in wanted:
        raise ValueError(f"{name} is {value!r}, must be one of {', '.join(wanted)}")
