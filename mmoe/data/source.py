"""Random access to a prepared data set, one `pread` per part of a sample."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmoe.data import cv_bench
from mmoe.data.index import Shards, read_index
from mmoe.data.pack import Lengths
from mmoe.data.shards import is_dataset, read_card
from mmoe.errors import UserError

MADE = ("stamps", "scenes", "cv_bench")
"""What `mmoe data prepare` can make: each a folder of the data root, with a folder a split."""


def name_of(path: Path) -> str:
    """What a data set that a command names by its folder is called: the last two parts of the path."""
    return "/".join(path.absolute().parts[1:][-2:])


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A sample as it was read: its JSON record and its images, still encoded."""

    record: dict[str, Any]
    images: tuple[bytes, ...]
    """Each empty where the images were not asked for."""


class Source:
    """A data set's index in memory, its shards opened when they are first read.

    Args:
        path: the data set's folder, e.g. ``<root>/scenes/train``.
        name: the source's name in messages, e.g. ``scenes/train``.

    Raises:
        UserError: there is no such data set, or its index cannot be read or fits neither its card nor itself.
    """

    def __init__(self, path: Path, name: str) -> None:
        if not is_dataset(path):
            if cv_bench.files(path):
                what = "no data set, but CV-Bench's files"
                raise UserError(what, str(path), "`mmoe evaluate --suite cv_bench` asks them")
            parts, fix = Path(name).parts, "give a folder that `mmoe data prepare` made"
            if parts and parts[0] in MADE:
                root = (path if len(path.parts) >= len(parts) else path.absolute()).parents[len(parts) - 1]
                fix = f"make it with `mmoe data prepare {parts[0]} {root}`"
            raise UserError("the data set is missing", str(path), fix)
        self.name = name
        self.path = path
        self._index = read_index(path)
        if not len(self):
            raise UserError("the data set has no samples", str(path), "prepare it again")
        self.tokenizer = str(self._index["tokenizer"])
        """SHA-256 of the tokenizer that the lengths are counted with."""
        self._shards = Shards(path)

    def __len__(self) -> int:
        return len(self._index["key"])

    def key(self, number: int) -> str:
        """The sample's name in messages: ``source/key``."""
        return f"{self.name}/{self._index['key'][number].decode()}"

    def lengths(self, image_tokens: int, more: int = 0) -> Lengths:
        """Tokens of the samples' documents, where an image takes ``image_tokens`` and each has ``more`` of a system
        prompt, and their images."""
        images = np.diff(self._index["image_start"])
        text = self._index["prefix_tokens"].astype(np.int64) + self._index["branch_tokens"]
        return Lengths(tokens=1 + more + text + images * image_tokens, images=images)

    @property
    def images(self) -> int:
        """How many, in all samples."""
        return len(self._index["image_offset"])

    def image_range(self, number: int) -> range:
        """The numbers of a sample's images within the data set."""
        return range(int(self._index["image_start"][number]), int(self._index["image_start"][number + 1]))

    def samples_of(self, images: range) -> range:
        """The samples that ``images``, numbers within the data set, belong to, and those between."""
        if not images:
            return range(0)
        first, last = np.searchsorted(self._index["image_start"], [images[0], images[-1]], side="right")
        return range(int(first) - 1, int(last))

    def identity(self) -> str:
        """SHA-256 of what its images are: the shards' checksums by the card, and where in them each image lies."""
        card, index = read_card(self.path), self._index
        digest = hashlib.sha256(repr([entry["sha256"] for entry in card["shard"]]).encode())
        for name in ("shard", "image_start", "image_offset", "image_length"):
            digest.update(index[name].tobytes())
        return digest.hexdigest()

    def read(self, number: int, images: bool = True) -> Encoded:
        """Reads one sample, its ``images`` too or its record alone.

        Raises:
            BadSample: its bytes are not there, or its record is not a JSON object in UTF-8.
        """
        if not images:
            return Encoded(
                record=self._shards.record(self._index, number), images=(b"",) * len(self.image_range(number))
            )
        record, read = self._shards.sample(self._index, number)
        return Encoded(record=record, images=tuple(read))

    def close(self) -> None:
        """The next read opens the shards again."""
        self._shards.close()
