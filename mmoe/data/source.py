"""Random access to a prepared data set, one `pread` per part of a sample."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmoe.data.index import Shards, read_index
from mmoe.data.pack import Lengths
from mmoe.data.shards import is_dataset
from mmoe.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A sample as it was read: its JSON record and its images, still encoded."""

    record: dict[str, Any]
    images: tuple[bytes, ...]


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
            parts = Path(name).parts
            root = path.parents[len(parts) - 1]
            raise UserError("the data set is missing", str(path), f"make it with `mmoe data prepare {parts[0]} {root}`")
        self.name = name
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

    def lengths(self, image_tokens: int) -> Lengths:
        """Tokens of the samples' documents, where an image takes ``image_tokens``, and their images."""
        images = np.diff(self._index["image_start"])
        text = self._index["prefix_tokens"].astype(np.int64) + self._index["branch_tokens"]
        return Lengths(tokens=1 + text + images * image_tokens, images=images)

    def read(self, number: int) -> Encoded:
        """Reads one sample.

        Raises:
            BadSample: its bytes are not there, or its record is not a JSON object in UTF-8.
        """
        record, images = self._shards.sample(self._index, number)
        return Encoded(record=record, images=tuple(images))

    def close(self) -> None:
        """The next read opens the shards again."""
        self._shards.close()
