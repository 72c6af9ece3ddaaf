"""The stream of samples: a pure function of (seed, mixture, index), without state.

Place i of the stream belongs to a source by an even blend of the weights (period :data:`PERIOD`). The n-th time a
source has its turn, it gives the sample at n mod size of epoch n // size, permuted anew in each epoch; a source with
shorter epochs, n mod epoch of epoch n // epoch, drawn from all of it.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mmoe import _host

PERIOD = 1 << 16
"""After so many samples the blend of the sources begins anew; a weight is kept to 1/PERIOD."""


@lru_cache(maxsize=4096)
def key(*parts: int | str) -> int:
    """A 64-bit key from a seed and names, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def shares(weights: Sequence[float]) -> NDArray[np.int64]:
    """Whole numbers of sum :data:`PERIOD` in proportion to the weights by largest remainder; none becomes 0."""
    wanted = np.asarray(weights, np.float64) / np.sum(weights) * PERIOD
    counts = np.maximum(1, np.floor(wanted)).astype(np.int64)
    for _ in range(abs(PERIOD - int(counts.sum()))):
        if counts.sum() < PERIOD:
            counts[np.argmax(wanted - counts)] += 1
        else:
            counts[np.argmax(np.where(counts > 1, counts - wanted, -np.inf))] -= 1
    return counts


class Order:
    """Which sample of which source stands where in the stream.

    Args:
        names: of the sources; a source's own order depends on its name and the seed alone.
        sizes: samples in each source, > 0.
        weights: the share of the stream's samples each source has, > 0, of any sum.
        epochs: samples in an epoch of each source, from 1 to its size; without it all of them.
    """

    def __init__(
        self,
        names: Sequence[str],
        sizes: Sequence[int],
        weights: Sequence[float],
        seed: int,
        epochs: Sequence[int] | None = None,
    ) -> None:
        self.names, self.sizes, self.seed = tuple(names), tuple(sizes), seed
        self.epochs = self.sizes if epochs is None else tuple(epochs)
        self.counts = shares(weights)
        self._source, self._rank = _host.blend(self.counts)

    def at(self, start: int, count: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Places [start, start + count) of the stream: the sources' numbers and the samples' numbers, ``[count]``."""
        period, place = np.divmod(np.arange(start, start + count), PERIOD)
        source = self._source[place]
        turn = period * self.counts[source] + self._rank[place]
        sample = np.empty(count, np.int64)
        for k, (size, length) in enumerate(zip(self.sizes, self.epochs, strict=True)):
            mine = np.flatnonzero(source == k)
            epochs, index = np.divmod(turn[mine], length)
            for epoch in np.unique(epochs):
                here = epochs == epoch
                sample[mine[here]] = _host.permute(index[here], size, key(self.seed, self.names[k], int(epoch)))
        return source, sample
