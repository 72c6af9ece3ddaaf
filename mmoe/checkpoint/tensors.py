"""Tensors that lie somewhere and are read when they are asked for, whole or a stretch at a time."""

import errno
import hashlib
import math
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

COMPARED = 1 << 22
"""Elements that are compared at a time."""


@dataclass(frozen=True)
class Spec:
    """What is known of a tensor before any of it is read."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Tensors(Mapping[str, Tensor]):
    """Tensors by name. ``tensors[name]`` reads one, :meth:`read` a stretch of one; :attr:`specs` costs no reading."""

    specs: Mapping[str, Spec]
    """Every tensor's shape and dtype, in the order of the tensors."""

    @abstractmethod
    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fills ``out`` [n], of the tensor's dtype, with its elements ``start`` to ``start + n`` in row-major order.

        Raises:
            UserError: what they lie in is damaged.
        """

    def fingerprint(self) -> str | None:
        """Equal as long as the tensors are; None where that is not known."""
        return None

    def __getitem__(self, name: str) -> Tensor:
        spec = self.specs[name]
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        self.read(name, 0, tensor.view(-1))
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


class Memory(Tensors):
    """Tensors in memory; of those on the meta device only the :attr:`specs` are of use. ``known`` is their fingerprint,
    where who made them knows it."""

    def __init__(self, tensors: Mapping[str, Tensor], known: str | None = None) -> None:
        self.tensors, self.known = tensors, known
        self.specs = {name: Spec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}

    def read(self, name: str, start: int, out: Tensor) -> None:
        out.copy_(self.tensors[name].detach().reshape(-1)[start : start + out.numel()])

    def fingerprint(self) -> str | None:
        return self.known


def lazy(tensors: Mapping[str, Tensor]) -> Tensors:
    return tensors if isinstance(tensors, Tensors) else Memory(tensors)


class Rows(NamedTuple):
    """Rows of a tensor, ``count`` from the one numbered ``first``; all of it where ``count`` is None."""

    name: str
    first: int = 0
    count: int | None = None


class View(Tensors):
    """Some of ``tensors``, or rows of them, under other names."""

    def __init__(self, tensors: Tensors, rows: Mapping[str, Rows]) -> None:
        self.tensors, self.rows = tensors, rows
        self.specs = {}
        for name, (old, _, count) in rows.items():
            spec = tensors.specs[old]
            self.specs[name] = spec if count is None else Spec(torch.Size([count, *spec.shape[1:]]), spec.dtype)

    def read(self, name: str, start: int, out: Tensor) -> None:
        old, first, _ = self.rows[name]
        self.tensors.read(old, first * math.prod(self.specs[name].shape[1:]) + start, out)

    def fingerprint(self) -> str | None:
        return self.tensors.fingerprint()


class Part(View):
    """Those of ``tensors`` whose names start with ``prefix``."""

    def __init__(self, tensors: Tensors, prefix: str) -> None:
        super().__init__(tensors, {name: Rows(name) for name in tensors if name.startswith(prefix)})


class Together(Tensors):
    """The tensors of several, each with names of its own.

    ``of``: what else they depend on, which the fingerprint tells of.
    """

    def __init__(self, parts: Sequence[Tensors], of: str = "") -> None:
        self.parts = {name: part for part in parts for name in part}
        self.specs = {name: spec for part in parts for name, spec in part.specs.items()}
        if len(self.specs) < sum(map(len, parts)):
            raise ValueError("two of the parts have a tensor of one name")
        prints = [part.fingerprint() for part in parts]
        self.known = None if None in prints else hashlib.sha256(repr((of, prints)).encode()).hexdigest()

    def read(self, name: str, start: int, out: Tensor) -> None:
        self.parts[name].read(name, start, out)

    def fingerprint(self) -> str | None:
        return self.known


def read_as(tensors: Tensors, name: str, start: int, out: Tensor) -> None:
    """:meth:`Tensors.read` into another dtype, each element rounded once."""
    dtype = tensors.specs[name].dtype
    if dtype == out.dtype:
        tensors.read(name, start, out)
        return
    part = torch.empty(out.shape, dtype=dtype)
    tensors.read(name, start, part)
    out.copy_(part)


def difference(
    a: Tensors, name_a: str, b: Tensors, name_b: str, advance: Callable[[int], None] = lambda count: None
) -> float | None:
    """How far the elements of two tensors of one shape and dtype are apart at most; None if all bytes are equal.

    NaN equals itself, 0 does not equal −0. ``advance`` is told of the bytes that are compared.
    """
    spec, most = a.specs[name_a], None
    size = max(1, min(COMPARED, spec.numel))
    x, y = torch.empty(size, dtype=spec.dtype), torch.empty(size, dtype=spec.dtype)
    for start in range(0, spec.numel, size):
        count = min(size, spec.numel - start)
        a.read(name_a, start, x[:count])
        b.read(name_b, start, y[:count])
        if not torch.equal(x[:count].view(torch.uint8), y[:count].view(torch.uint8)):
            apart = (x[:count].double() - y[:count].double()).abs().max()
            most = apart if most is None else torch.maximum(most, apart)
        advance(count * spec.dtype.itemsize)
    return None if most is None else most.item()


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous one-dimensional tensor."""
    return tensor.view(torch.uint8).numpy().data


def fill(handle: int, offset: int, out: Tensor) -> None:
    """Fills ``out``, contiguous and one-dimensional, with the bytes of a file from ``offset`` on.

    Raises:
        OSError: it cannot be read.
        ValueError: it ends before.
    """
    if _is_hole(handle, offset, out.nbytes):
        out.zero_()
        return
    left = memory(out)
    while left:
        count = os.preadv(handle, [left], offset)
        if not count:
            raise ValueError(f"it ends {len(left)} bytes too early")
        left, offset = left[count:], offset + count


def _is_hole(handle: int, offset: int, size: int) -> bool:
    """Whether these bytes of a file have no place on the disk: they are zeros, and reading them would fill the page
    cache with them."""
    try:
        return os.lseek(handle, offset, os.SEEK_DATA) >= offset + size
    except OSError as error:  # ENXIO: no data from there to the end
        return error.errno == errno.ENXIO and os.fstat(handle).st_size >= offset + size
