"""Two-way tables between our parameter names and a family's: every name is listed, so nothing is dropped in silence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmoe.errors import UserError


@dataclass(frozen=True)
class Entry:
    """One of our tensors and theirs that make it up, one after another along dimension 0.

    ``stacked``: ours has one more dimension in front; its rows are made up of equal parts of ``theirs`` in turn.
    ``unused_rows``: their one tensor has so many further rows, written as zeros and not read.
    ``halves``: ours keeps the two halves of each of its rows apart, [rows, 2, …].
    """

    ours: str
    theirs: tuple[str, ...]
    stacked: int = 0
    unused_rows: int = 0
    halves: bool = False

    def write(self, tensor: Tensor) -> dict[str, Tensor]:
        """Ours → theirs by name."""
        tensor = tensor.flatten(1, 2) if self.halves else tensor
        if self.stacked:
            parts = [part for row in tensor for part in row.chunk(len(self.theirs) // self.stacked)]
        else:
            parts = list(tensor.chunk(len(self.theirs)))
        if self.unused_rows:
            parts = [torch.cat([parts[0], parts[0].new_zeros(self.unused_rows, *parts[0].shape[1:])])]
        return {name: part.contiguous() for name, part in zip(self.theirs, parts, strict=True)}

    def read(self, theirs: Mapping[str, Tensor]) -> Tensor:
        """Theirs by name → ours."""
        tensor = self._joined(theirs)
        return tensor.unflatten(1, (2, -1)) if self.halves else tensor

    def _joined(self, theirs: Mapping[str, Tensor]) -> Tensor:
        parts = [theirs[name] for name in self.theirs]
        if self.unused_rows:
            return parts[0][: -self.unused_rows].clone()
        if not self.stacked:
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        each = len(parts) // self.stacked
        return torch.stack([torch.cat(parts[i * each : (i + 1) * each]) for i in range(self.stacked)])


@dataclass(frozen=True)
class Table:
    """All entries of a model.

    ``padding``: their tensors that no computation reads, with the name of a tensor of the same shape: written as zeros,
    optional and not looked at when reading.
    """

    entries: Sequence[Entry]
    padding: Mapping[str, str] = field(default_factory=dict)

    def write(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict → theirs.

        Raises:
            UserError: a tensor that is missing, or that no entry reads.
        """
        _compare({entry.ours for entry in self.entries}, set(ours), "the model's state")
        theirs: dict[str, Tensor] = {}
        for entry in self.entries:
            theirs |= entry.write(ours[entry.ours])
        return theirs | {name: torch.zeros_like(theirs[like]) for name, like in self.padding.items()}

    def read(self, theirs: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """Their state dict → ours.

        Raises:
            UserError: a tensor that is missing, that no entry reads, or of another shape.
        """
        names = {name for entry in self.entries for name in entry.theirs}
        _compare(names, set(theirs) - set(self.padding), where)
        ours = {}
        for entry in self.entries:
            try:
                ours[entry.ours] = entry.read(theirs)
            except (RuntimeError, IndexError):
                what = f"{where} has shapes that do not make up {entry.ours}, from tensor {entry.theirs[0]}"
                raise UserError(what, "", "the weights do not fit the configuration") from None
        return ours


def _compare(wanted: set[str], found: set[str], where: str) -> None:
    for kind, names in (("lacks", wanted - found), ("has unread", found - wanted)):
        if names:
            first, more = min(names), f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{where} {kind} tensor {first}{more}", "", "the weights do not fit the configuration")
