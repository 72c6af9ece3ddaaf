"""Reads the features of frozen encoders (:mod:`mmoe.data.cache`) in the place of pixels."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts
import torch
from torch import Tensor

from mmoe.data.cache import CARD, COMMAND, DTYPES, Card, Parts, anew, open_array, place, shard_file
from mmoe.data.source import Source
from mmoe.errors import UserError

POOL_BYTES = 1 << 26
"""Of what is read kept in memory: the shards' indices, above all."""


def _tensor(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(values.view(np.uint16)).view(dtype) if dtype == torch.bfloat16 else torch.from_numpy(values)


class Cached(NamedTuple):
    """What is cached of ``n`` images."""

    features: dict[str, list[Tensor]]
    """Encoder → its maps, [n, g, g, c]."""
    blank: dict[str, list[Tensor]]
    """Encoder → the maps of an image of zeros, [g, g, c]."""
    sizes: Tensor
    """int64 [n, 2]: height and width, upright, before any resize."""
    bad: dict[int, str]
    """Why each bad image is bad, by its place among the n."""

    def clear(self, images: range) -> None:
        """Makes those of ``images`` blank."""
        for name, maps in self.features.items():
            for rows, row in zip(maps, self.blank[name], strict=True):
                rows[images.start : images.stop] = row


class _Array:
    """One encoder's features of one data set, to be read."""

    def __init__(self, folder: Path, parts: Parts, context: Any) -> None:
        self.folder, self.card = folder, Card.read(folder)
        self.card.check(folder, parts)
        self.dtype = DTYPES[parts["precision.dtype"]][1]
        paths = [folder / f"map-{i}" for i in range(len(self.card.maps))]
        whole = all(shard_file(path, n, 4).is_file() for path in paths for n in range(len(self.card.shards)))
        if not (self.card.complete and whole):
            raise UserError("the cached features are not complete", str(folder), f"run it again: {COMMAND}")
        shapes = [(self.card.rows, *shape) for shape in self.card.maps]
        wanted = [*((s, DTYPES[parts["precision.dtype"]][0]) for s in shapes), ((self.card.rows, 2), "int64")]
        try:
            opened = [open_array(path, context) for path in [*paths, folder / "sizes"]]
            for path, array, (shape, dtype) in zip([*paths, folder / "sizes"], opened, wanted, strict=True):
                if (tuple(array.shape), array.dtype.name) != (shape, dtype):
                    what = f"{path.name} is {list(array.shape)} {array.dtype.name}, not {list(shape)} {dtype}"
                    raise ValueError(what)
            self.arrays = opened[:-1]
            self.sizes = torch.from_numpy(opened[-1].read().result())
            if bool((self.sizes < 0).any()):
                raise ValueError("sizes of images are missing")
            numbers = [*self.card.bad, *self.card.unreadable]
            if not all(number.isdecimal() for number in numbers):
                raise ValueError("a bad sample has no number")
        except ValueError as error:
            raise UserError(f"the cached features are damaged: {error}", str(folder), anew(folder)) from None
        self.bad = {int(number): reason for number, reason in self.card.bad.items()}
        self.unreadable = {int(number): reason for number, reason in self.card.unreadable.items()}
        self.blank = [read() for read in self.start(np.array([self.card.images]))]

    def start(self, rows: np.ndarray) -> list[Callable[[], Tensor]]:
        """Begins to read ``rows`` of each map; what it returns waits for them."""

        def wait(number: int, future: Any) -> Tensor:
            try:
                values = _tensor(future.result(), self.dtype)
            except ValueError as error:
                raise self._damage(number, rows, str(error)) from None
            absent = values[:, 0, 0, 0].isnan().nonzero()
            if len(absent):
                row = int(rows[int(absent[0])])
                raise self._damaged(number, row, f"no features of image {row}, or not finite ones")
            return values

        begun = [array[rows].read() for array in self.arrays]
        return [lambda n=n, future=future: wait(n, future) for n, future in enumerate(begun)]

    def _damage(self, number: int, rows: np.ndarray, reason: str) -> UserError:
        """Of which of ``rows`` the ``reason`` is."""
        for row in rows.tolist():
            try:
                self.arrays[number][row].read().result()
            except ValueError as error:
                return self._damaged(number, row, str(error).rpartition(": ")[2])
        return self._damaged(number, int(rows[0]), reason)

    def _damaged(self, number: int, row: int, reason: str) -> UserError:
        file = shard_file(self.folder / f"map-{number}", row // self.card.images_per_shard, 4)
        fix = f"remove this file and make it again, the others stay: {COMMAND}; then go on with --resume"
        return UserError(f"cached features are damaged: {reason}", str(file), fix)


class Features:
    """The cached features of a mixture's data sets.

    Args:
        folder: ``data.features``.
        sources: the data sets.
        expected: the cached encoders' :func:`parts_of`.

    Raises:
        UserError: a data set is missing, or its features are incomplete, damaged or of something else.
    """

    def __init__(self, folder: Path, sources: Sequence[Source], expected: Mapping[str, Parts]) -> None:
        context = ts.Context({"cache_pool": {"total_bytes_limit": POOL_BYTES}})
        self._sets = [
            {
                name: _Array(place(folder, source.name, name), {**parts, "data set": source.identity()}, context)
                for name, parts in expected.items()
            }
            for source in sources
        ]
        for source, arrays in zip(sources, self._sets, strict=True):
            wrong = next((array for array in arrays.values() if array.card.images != source.images), None)
            if wrong is not None:
                what = f"{wrong.card.images} images are cached, the data set has {source.images}"
                raise UserError(what, str(wrong.folder), anew(wrong.folder))

    def unreadable(self, source: int, sample: int) -> str | None:
        """Why a sample could not be read when the features were made."""
        return next((text for array in self._sets[source].values() if (text := array.unreadable.get(sample))), None)

    def start(self, images: Sequence[tuple[int, int]]) -> Callable[[], Cached]:
        """Begins to read ``images``, pairs of a data set's place in the mixture and an image's number in it; what it
        returns waits for them, and raises :class:`UserError` where a file is damaged."""
        pairs = np.array(images, np.int64).reshape(-1, 2)
        begun = [
            (at, [(name, array, array.start(pairs[at, 1])) for name, array in self._sets[number].items()])
            for number in np.unique(pairs[:, 0]).tolist()
            for at in [np.flatnonzero(pairs[:, 0] == number)]
        ]

        def finish() -> Cached:
            first = self._sets[0]
            features = {
                name: [row.new_empty((len(pairs), *row.shape[1:])) for row in array.blank]
                for name, array in first.items()
            }
            sizes, bad = torch.ones(len(pairs), 2, dtype=torch.int64), {}
            for at, arrays in begun:
                for name, array, reads in arrays:
                    for out, read in zip(features[name], reads, strict=True):
                        out[torch.from_numpy(at)] = read()
                    sizes[torch.from_numpy(at)] = array.sizes[pairs[at, 1]]
                    bad |= {i: array.bad[n] for i in at.tolist() if (n := int(pairs[i, 1])) in array.bad}
            blank = {name: [row[0] for row in array.blank] for name, array in first.items()}
            return Cached(features, blank, sizes, bad)

        return finish


def cached(folder: Path, data_sets: Sequence[str], encoders: Sequence[str]) -> tuple[str, ...]:
    """Those of ``encoders`` whose features ``folder`` holds.

    Raises:
        UserError: there are none, or not of every data set.
    """
    there = {name: [(place(folder, path, name) / CARD).is_file() for path in data_sets] for name in encoders}
    names = tuple(name for name, found in there.items() if any(found))
    if not names:
        what = f"no features of {', '.join(encoders)} are there"
        raise UserError(what, f"data.features = {folder}", f"make them: {COMMAND}")
    for name in names:
        for path, found in zip(data_sets, there[name], strict=True):
            if not found:
                what = f"features of encoder {name} are there, but not of the data set {path}"
                raise UserError(what, f"data.features = {folder}", f"make them: {COMMAND}")
    return names
