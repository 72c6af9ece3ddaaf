"""Packs: several documents to a sequence, planned from lengths alone, then put together as tensors.

The plan goes by windows of consecutive samples of the stream. Within a window the packs are filled largest document
first (csrc/host/pack.h) and come in a keyed random order; a window is planned on its own, from its number alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmoe import _host
from mmoe.data.document import Document
from mmoe.data.order import Order, key
from mmoe.errors import UserError

WINDOW = 512
"""Samples in a window, at least; doubled until they fill :data:`PACKS_IN_WINDOW` packs, of which one is part empty."""
PACKS_IN_WINDOW = 32

Slot = tuple[int, int]
"""A sample: the number of its source, its number there."""


@dataclass(frozen=True, kw_only=True)
class Window:
    packs: tuple[tuple[Slot, ...], ...]
    """In each the samples in the order of the stream."""
    oversize: tuple[Slot, ...]
    """Samples that fit in no pack."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """What the planner knows of one source, ``[samples]`` each."""

    tokens: NDArray[np.int64]
    """Of the whole document, images included."""
    images: NDArray[np.int64]


class Planner:
    """The packs of a stream: a pure function of the order and the lengths.

    Args:
        order: the stream of samples.
        lengths: per source of the order.
        sequence_length: tokens that a pack holds.
        images_per_pack: images that a pack holds.

    Raises:
        UserError: not one sample of a source fits in a pack.
    """

    def __init__(self, order: Order, lengths: Sequence[Lengths], *, sequence_length: int, images_per_pack: int) -> None:
        self.order, self.lengths = order, tuple(lengths)
        self.sequence_length, self.images_per_pack = sequence_length, images_per_pack
        for name, part in zip(order.names, lengths, strict=True):
            if not np.any((part.tokens <= sequence_length) & (part.images <= images_per_pack)):
                raise UserError(
                    f"no sample of {name} fits in a pack of {sequence_length} tokens and {images_per_pack} images",
                    "data.sequence_length",
                    f"the shortest has {part.tokens.min()} tokens, the fewest images are {part.images.min()}",
                )
        mean = sum(c * part.tokens.mean() for c, part in zip(order.counts, lengths, strict=True)) / order.counts.sum()
        self.samples = WINDOW
        while self.samples * mean < PACKS_IN_WINDOW * sequence_length:
            self.samples *= 2

    def window(self, number: int) -> Window:
        """Plans the ``number``-th window; it has no packs only where every sample of it is oversize."""
        source, sample = self.order.at(number * self.samples, self.samples)
        tokens, images = np.empty((2, self.samples), np.int64)
        for k, part in enumerate(self.lengths):
            mine = source == k
            tokens[mine], images[mine] = part.tokens[sample[mine]], part.images[sample[mine]]
        pack = _host.pack(tokens, images, self.sequence_length, self.images_per_pack)
        slots = list(zip(source.tolist(), sample.tolist(), strict=True))
        packs: list[list[Slot]] = [[] for _ in range(pack.max() + 1)]
        for slot, p in zip(slots, pack.tolist(), strict=True):
            if p >= 0:
                packs[p].append(slot)
        place = _host.permute(np.arange(len(packs)), len(packs), key(self.order.seed, "packs", number)) if packs else []
        return Window(
            packs=tuple(tuple(packs[p]) for p in place),
            oversize=tuple(slot for slot, p in zip(slots, pack.tolist(), strict=True) if p < 0),
        )


def assemble(packs: Sequence[Sequence[Document]], sequence_length: int) -> dict[str, Tensor | list[list[str]]]:
    """The tokens' part of a batch: every pack's documents one after another, padded to ``sequence_length``.

    Returns:
        ``tokens``, ``labels``, ``position`` ``[packs, sequence_length]`` int64, ``loss_mask`` float32, ``document`` and
        ``branch`` int32, and ``samples``, the keys in each pack. See ``docs/architecture.md``.

    Raises:
        ValueError: a pack's documents are longer than ``sequence_length``.
    """
    shape = (len(packs), sequence_length)
    batch = {name: np.zeros(shape, np.int64) for name in ("tokens", "labels", "position")}
    batch |= {"loss_mask": np.zeros(shape, np.float32)}
    batch |= {name: np.zeros(shape, np.int32) for name in ("document", "branch")}
    for row, documents in enumerate(packs):
        start = 0
        for number, document in enumerate(documents, 1):
            here = slice(start, start := start + len(document))
            if start > sequence_length:
                raise ValueError(f"{start} tokens in a pack of {sequence_length}, at {document.key}")
            for name in ("tokens", "labels", "position", "loss_mask", "branch"):
                batch[name][row, here] = getattr(document, name)
            batch["document"][row, here] = number
    tensors: dict[str, Tensor | list[list[str]]] = {name: torch.from_numpy(array) for name, array in batch.items()}
    return tensors | {"samples": [[document.key for document in documents] for documents in packs]}
