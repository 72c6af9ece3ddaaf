"""Two-way tables between our parameter names and a family's: every name is listed, so nothing is dropped in silence.

A table moves elements and computes nothing. What it gives is again read when it is asked for (:class:`Tensors`).
"""

import hashlib
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mmoe.checkpoint.tensors import Spec, Tensors, difference, lazy, read_as
from mmoe.errors import UserError


class Run(NamedTuple):
    """The elements of theirs that are used: they lie side by side in ours, in row-major order."""

    theirs: str
    start: int
    count: int

    @property
    def stop(self) -> int:
        return self.start + self.count


@dataclass(frozen=True)
class Entry:
    """One of our tensors and theirs that make it up, equal parts one after another along dimension 0.

    ``stacked``: ours has one more dimension in front; its rows are made up of equal numbers of ``theirs`` in turn.
    ``halves``: ours keeps the two halves of each of its rows apart, [rows, 2, …].
    ``shapes``: ours and theirs, of one tensor whose elements are in the same order under another shape.
    ``unused_rows``: their one tensor has so many further rows, written as zeros and not read.
    ``tied``: further names of theirs for the same tensor, which are not written; where one is there, it must be equal.
    ``fp32``: theirs stays in fp32, whatever the others are stored in.
    """

    ours: str
    theirs: tuple[str, ...]
    stacked: int = 0
    halves: bool = False
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    unused_rows: int = 0
    tied: tuple[str, ...] = ()
    fp32: bool = False

    def their_shapes(self, ours: torch.Size) -> list[torch.Size]:
        """The shapes of ``theirs``.

        Raises:
            ValueError: ours is not made up of such parts.
        """
        shape = list(ours)
        if self.shapes:
            if self.shapes[0] != tuple(ours):
                raise ValueError(f"it is {shape}, not {list(self.shapes[0])}")
            shape = list(self.shapes[1])
        if self.halves:
            shape[1:3] = [shape[1] * shape[2]]
        if self.stacked and shape.pop(0) != self.stacked:
            raise ValueError(f"it has not {self.stacked} rows")
        if not shape:
            return [torch.Size(shape)]
        parts = len(self.theirs) // max(1, self.stacked)
        rows, rest = divmod(shape[0], parts)
        if rest:
            raise ValueError(f"{shape[0]} rows are not made up of {parts} equal parts")
        return [torch.Size([rows + self.unused_rows, *shape[1:]])] * len(self.theirs)

    def our_shape(self, theirs: Sequence[torch.Size]) -> torch.Size:
        """The shape of ``ours``.

        Raises:
            ValueError: theirs do not make it up.
        """
        shape = list(theirs[0])
        if shape:
            parts = len(self.theirs) // max(1, self.stacked)
            shape[0] = parts * (shape[0] - self.unused_rows)
        if self.stacked:
            shape.insert(0, self.stacked)
        if self.halves:
            if len(shape) < 2 or shape[1] % 2:
                raise ValueError("its rows have no halves")
            shape[1:2] = [2, shape[1] // 2]
        ours = torch.Size(self.shapes[0] if self.shapes else shape)
        if min(ours, default=0) < 0 or self.their_shapes(ours) != list(theirs):
            raise ValueError("the parts do not fit together")
        return ours

    def runs(self, shapes: Sequence[torch.Size]) -> Iterator[Run]:
        """How the elements of theirs, of these ``shapes``, lie in ours, in the order of ours."""
        row = math.prod(shapes[0][1:])
        counts = [math.prod(shape) - self.unused_rows * row for shape in shapes]
        start = 0
        for name, count in zip(self.theirs, counts, strict=True):
            yield Run(name, start, count)
            start += count


@dataclass(frozen=True)
class Table:
    """All entries of a model.

    ``padding``: their tensors that no computation reads, with the name of a tensor of the same shape: written as zeros,
    optional and not looked at when reading.
    """

    entries: Sequence[Entry]
    padding: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        theirs = [name for entry in self.entries for name in (*entry.theirs, *entry.tied)] + list(self.padding)
        for names in ([entry.ours for entry in self.entries], theirs):
            twice = next((name for name, count in Counter(names).items() if count > 1), None)
            if twice is not None:
                raise ValueError(f"{twice} stands in the table twice")

    def __add__(self, other: "Table") -> "Table":
        return Table([*self.entries, *other.entries], {**self.padding, **other.padding})

    def prefixed(self, ours: str = "", theirs: str = "") -> "Table":
        """The table of the same model as a part of another one, with these in front of the names."""
        renamed = self.renamed(lambda name: f"{theirs}{name}")
        return replace(renamed, entries=[replace(entry, ours=f"{ours}{entry.ours}") for entry in renamed.entries])

    def renamed(self, theirs: Callable[[str], str]) -> "Table":
        """The table of the same model whose other side has its names by ``theirs``."""
        entries = [
            replace(entry, theirs=tuple(map(theirs, entry.theirs)), tied=tuple(map(theirs, entry.tied)))
            for entry in self.entries
        ]
        return Table(entries, {theirs(name): theirs(like) for name, like in self.padding.items()})

    def write(self, ours: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Tensors:
        """Our tensors → theirs, in ``dtype``, or as ours are.

        Raises:
            UserError: a tensor that is missing, that no entry reads, or that theirs cannot make up.
        """
        return _Theirs(self, lazy(ours), dtype)

    def read(self, theirs: Mapping[str, Tensor], where: str) -> Tensors:
        """Their tensors → ours.

        Raises:
            UserError: a tensor that is missing, that no entry reads, or of another shape; or tied ones that differ.
        """
        return _Ours(self, lazy(theirs), where)

    def fingerprint(self, source: str | None) -> str | None:
        """Of what the table makes of the tensors with the fingerprint ``source``: another table makes others of them.
        None where that of the source is not known."""
        if source is None:
            return None
        return hashlib.sha256(repr((source, list(self.entries), dict(self.padding))).encode()).hexdigest()


class _Theirs(Tensors):
    def __init__(self, table: Table, ours: Tensors, dtype: torch.dtype | None) -> None:
        self.ours, self.known = ours, table.fingerprint(ours.fingerprint())
        _compare({entry.ours for entry in table.entries}, set(ours), "the model's state")
        self.specs = {}
        self.runs: dict[str, tuple[str, Run]] = {}
        for entry in table.entries:
            spec = ours.specs[entry.ours]
            stored = spec.dtype if dtype is None else torch.float32 if entry.fp32 else dtype
            try:
                shapes = entry.their_shapes(spec.shape)
                self.specs |= {n: Spec(shape, stored) for n, shape in zip(entry.theirs, shapes, strict=True)}
            except (ValueError, IndexError) as error:
                what = f"{entry.ours} {list(spec.shape)} is not made up of {entry.theirs[0]}: {error}"
                raise UserError(what, "the model's state", "the weights do not fit the configuration") from None
            self.runs |= {run.theirs: (entry.ours, run) for run in entry.runs(shapes)}
        self.specs |= {name: self.specs[like] for name, like in table.padding.items()}

    def read(self, name: str, start: int, out: Tensor) -> None:
        used = 0
        if name in self.runs:
            ours, run = self.runs[name]
            used = min(max(run.count - start, 0), out.numel())
            if used:
                read_as(self.ours, ours, run.start + start, out[:used])
        out[used:].zero_()  # rows that no computation reads

    def fingerprint(self) -> str | None:
        return self.known


class _Ours(Tensors):
    def __init__(self, table: Table, theirs: Tensors, where: str) -> None:
        self.theirs, self.known = theirs, table.fingerprint(theirs.fingerprint())
        names = {name for entry in table.entries for name in entry.theirs}
        tied = {name for entry in table.entries for name in entry.tied}
        _compare(names, set(theirs) - set(table.padding) - tied, where)
        self.specs = {}
        self.runs: dict[str, list[Run]] = {}
        for entry in table.entries:
            specs = [theirs.specs[name] for name in entry.theirs]
            dtype = specs[0].dtype
            for spec in specs[1:]:
                dtype = torch.promote_types(dtype, spec.dtype)
            try:
                self.specs[entry.ours] = Spec(entry.our_shape([spec.shape for spec in specs]), dtype)
            except (ValueError, IndexError):
                what = f"{where} has shapes that do not make up {entry.ours}, from tensor {entry.theirs[0]}"
                raise UserError(what, "", "the weights do not fit the configuration") from None
            self.runs[entry.ours] = list(entry.runs([spec.shape for spec in specs]))
            for name in entry.tied:
                if name in theirs and _differ(theirs, entry.theirs[0], name):
                    what = f"{where} has other numbers in {name} than in {entry.theirs[0]}"
                    raise UserError(what, "", "the configuration ties them: export the model again")

    def read(self, name: str, start: int, out: Tensor) -> None:
        runs, stop = self.runs[name], start + out.numel()
        for run in runs[bisect_right(runs, start, key=lambda run: run.start) - 1 :]:
            if run.start >= stop:
                break
            first, last = max(start, run.start), min(stop, run.stop)
            if first < last:
                read_as(self.theirs, run.theirs, first - run.start, out[first - start : last - start])

    def fingerprint(self) -> str | None:
        return self.known


def _differ(tensors: Tensors, a: str, b: str) -> bool:
    return tensors.specs[a] != tensors.specs[b] or difference(tensors, a, tensors, b) is not None


def _compare(wanted: set[str], found: set[str], where: str) -> None:
    for kind, names in (("lacks", wanted - found), ("has unread", found - wanted)):
        if names:
            first, more = min(names), f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{where} {kind} tensor {first}{more}", "", "the weights do not fit the configuration")
