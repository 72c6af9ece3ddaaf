"""Features of frozen encoders on disk, computed once: a zarr v3 array for each data set, encoder and map.

``DIR/<data set>/<encoder>/`` holds ``map-0/``, ``map-1/``, … [images + 1, g, g, c] in the recipe's dtype, whose last
row is of a blank image (all zeros, as a bad sample shows); ``sizes/`` int64 [images + 1, 2]; ``done/NNNNNN.json``,
written last, for each shard that is whole; and ``cache.json``: what the features depend on, and which samples are bad.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
import torch
from torch import Tensor

from mmoe import reading
from mmoe.errors import UserError
from mmoe.recipe.model import AnyEncoder
from mmoe.recipe.schema import Data

FORMAT = 1
CARD = "cache.json"
LARGEST_CARD = 1 << 28
"""Bytes: a bad sample takes about a hundred."""
SHARD_BYTES, SHARD_IMAGES = 1 << 28, 1024
"""At most, of a shard: it is written at once, and what an interruption loses."""
PIXELS = "(x - 127.5) / 63.75"
COMMAND = "mmoe data encode RECIPE CHECKPOINT --out DIR"

Parts = dict[str, Any]
"""What features depend on, by name, as JSON."""
DTYPES = {"fp32": ("float32", torch.float32), "bf16": ("bfloat16", torch.bfloat16)}


def parts_of(encoder: AnyEncoder, weights: str, data: Data, dtype: str) -> Parts:
    """Everything that an encoder's features of an image depend on.

    Args:
        weights: SHA-256 of the encoder's weights.
        data: how images become pixels.
        dtype: of weights and activations, as ``precision.dtype`` has it.
    """
    table = {f"encoder.{name}": value for name, value in dataclasses.asdict(encoder).items()}
    view = {f"data.{name}": getattr(data, name) for name in ("fit", "interpolation", "decoder", "max_pixels")}
    # What says most of a difference stands first: another dtype is other weights too.
    parts = {**table, **view, "pixels": PIXELS, "precision.dtype": dtype, "weights": weights}
    return json.loads(json.dumps(parts))  # tuples as lists, as they come back from the file


@dataclass
class Card:
    """``cache.json``."""

    parts: Parts
    images: int
    images_per_shard: int
    maps: list[list[int]]
    """Of each map: g, g, c."""
    complete: bool = False
    unreadable: dict[str, str] = field(default_factory=dict)
    """Why a sample cannot be read, by its number."""
    bad: dict[str, str] = field(default_factory=dict)
    """Why an image is bad, by its number."""

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps([FORMAT, self.parts], sort_keys=True).encode()).hexdigest()

    @property
    def rows(self) -> int:
        return self.images + 1

    @property
    def shards(self) -> list[range]:
        """The rows of each shard."""
        step = self.images_per_shard
        return [range(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]

    def write(self, folder: Path) -> None:
        _write(folder / CARD, {"format": FORMAT, "key": self.key, **dataclasses.asdict(self)})

    @staticmethod
    def read(folder: Path) -> "Card":
        """Raises :class:`UserError` where it is unreadable, of another format, or altered."""
        path, values = folder / CARD, {}
        try:
            values = reading.json_object(reading.text(path, LARGEST_CARD))
            if values.pop("format", None) != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            key, card = values.pop("key", None), Card(**values)
            for name, kind in Card.__annotations__.items():
                wanted = getattr(kind, "__origin__", kind)
                if type(getattr(card, name)) is not wanted:
                    raise ValueError(f"{name} is {getattr(card, name)!r}")
            good = all(len(shape) == 3 and all(type(side) is int and side > 0 for side in shape) for shape in card.maps)
            if card.images < 0 or card.images_per_shard < 1 or not card.maps or not good:
                raise ValueError("its sizes are impossible")
            if key != card.key:
                raise ValueError("its key is not that of its parts")
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"the cache of features is unreadable: {error}", str(path), anew(folder)) from None
        return card

    def check(self, folder: Path, parts: Parts) -> None:
        """Raises :class:`UserError`, which names what differs, where this is of other features than ``parts``."""
        for name in [*parts, *self.parts]:
            there, here = self.parts.get(name), parts.get(name)
            if there != here:
                what = f"the cached features are of another {name}: there {_short(there)}, here {_short(here)}"
                fix = f"make them again, into another folder or with this one removed: {COMMAND}"
                raise UserError(what, str(folder), fix)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return f"{text[1:13]}…" if isinstance(value, str) and len(value) == hashlib.sha256().digest_size * 2 else text


def anew(folder: Path) -> str:
    return f"remove {folder} and make it again: {COMMAND}"


def _write(path: Path, value: Any) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def shard_file(array: Path, shard: int, axes: int) -> Path:
    """Of one of a zarr array's shards."""
    return array / "c" / str(shard) / "/".join(["0"] * (axes - 1))


def _checksummed() -> list[dict[str, Any]]:
    return [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


def open_array(path: Path, context: Any = None, metadata: dict[str, Any] | None = None) -> Any:
    """The zarr array at ``path``; made with ``metadata`` where it is not there.

    Raises:
        ValueError: it cannot be opened, or is another one.
    """
    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    # What is not written reads as the fill value: no features are NaN, no image has a negative size.
    more = {"metadata": metadata} if metadata else {"recheck_cached_data": "open"}
    return ts.open({**spec, **more}, open=True, create=metadata is not None, context=context).result()


def _metadata(shape: Sequence[int], shard: int, dtype: str, fill: Any, *, one_by_one: bool) -> dict[str, Any]:
    chunk, codecs = [shard, *shape[1:]], _checksummed()
    if one_by_one:
        inner = {"chunk_shape": [1, *shape[1:]], "codecs": codecs, "index_codecs": _checksummed()}
        codecs = [{"name": "sharding_indexed", "configuration": {**inner, "index_location": "end"}}]
    grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
    return {"shape": list(shape), "data_type": dtype, "fill_value": fill, "chunk_grid": grid, "codecs": codecs}


class Writer:
    """Adds shards to one encoder's features of one data set; what is whole of it already stays.

    Several processes may write at once: a shard appears whole, and its mark after it.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """

    def __init__(self, folder: Path, card: Card) -> None:
        self.folder, self.card = folder, card
        if (folder / CARD).exists():
            there = Card.read(folder)
            there.check(folder, card.parts)
            if (there.images, there.maps) != (card.images, card.maps):
                raise UserError("the cache's sizes do not fit the encoder", str(folder / CARD), anew(folder))
            card.images_per_shard = there.images_per_shard
        try:
            (folder / "done").mkdir(parents=True, exist_ok=True)
            if not (folder / CARD).exists():
                card.write(folder)
            name = DTYPES[card.parts["precision.dtype"]][0]
            per = min(card.images_per_shard, card.rows)
            self._maps = [
                open_array(path, None, _metadata([card.rows, *shape], per, name, "NaN", one_by_one=True))
                for path, shape in zip(self._paths, card.maps, strict=True)
            ]
            sizes = _metadata([card.rows, 2], per, "int64", -1, one_by_one=False)
            self._sizes = open_array(folder / "sizes", None, sizes)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write the features: {error}", str(folder), anew(folder)) from None

    @property
    def _paths(self) -> list[Path]:
        return [self.folder / f"map-{i}" for i in range(len(self.card.maps))]

    def _mark(self, shard: int) -> Path:
        return self.folder / "done" / f"{shard:06d}.json"

    @property
    def missing(self) -> list[int]:
        """Numbers of the shards that are still to be written."""
        files = [(path, 4) for path in self._paths] + [(self.folder / "sizes", 2)]
        return [
            n
            for n in range(len(self.card.shards))
            if not (self._mark(n).is_file() and all(shard_file(path, n, axes).is_file() for path, axes in files))
        ]

    def write(
        self, shard: int, maps: Sequence[Tensor], sizes: Tensor, unreadable: Mapping[int, str], bad: Mapping[int, str]
    ) -> None:
        """Writes a shard's rows, and marks it as whole once they are on the disk.

        Args:
            maps: [rows, g, g, c] each, of the array's dtype, on the CPU.
            sizes: int64 [rows, 2].
            unreadable, bad: as in :class:`Card`.

        Raises:
            UserError: the disk has no room, or will not be written.
        """
        rows = self.card.shards[shard]
        try:
            begun = [
                array[rows.start : rows.stop].write(_numpy(values, array.dtype.numpy_dtype))
                for array, values in zip([*self._maps, self._sizes], [*maps, sizes], strict=True)
            ]
            for one in begun:
                one.result()
            _write(self._mark(shard), {"unreadable": unreadable, "bad": bad})
        except (OSError, ValueError) as error:
            fix = "make room or mend the disk, and run the command again: it goes on where it was"
            raise UserError(f"cannot write the features: {error}", str(self.folder), fix) from None

    def finish(self) -> int:
        """Declares the features complete where no shard is missing; returns how many are."""
        if missing := len(self.missing):
            return missing
        self.card.unreadable, self.card.bad, self.card.complete = {}, {}, True
        for n in range(len(self.card.shards)):
            try:
                mark = reading.json_object(reading.text(self._mark(n), LARGEST_CARD))
                self.card.unreadable |= mark["unreadable"]
                self.card.bad |= mark["bad"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                what = f"the mark of a shard is unreadable: {error}"
                raise UserError(what, str(self._mark(n)), "remove it and run the command again") from None
        self.card.write(self.folder)
        return 0


def _numpy(values: Tensor, dtype: np.dtype) -> np.ndarray:
    return values.view(torch.uint16).numpy().view(dtype) if values.dtype == torch.bfloat16 else values.numpy()


def place(folder: Path, data_set: str, encoder: str) -> Path:
    """Where an encoder's features of a data set lie.

    Raises:
        UserError: the encoder's name is none of a folder.
    """
    if Path(encoder).name != encoder or encoder == "..":
        raise UserError(f"{encoder!r} is no name of a folder", "model.encoders", "give the encoder another name")
    return folder / data_set / encoder
