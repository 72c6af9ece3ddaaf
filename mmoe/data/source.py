"""Random access to a prepared data set, one `pread` per part of a sample."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmoe.data.document import BadSample
from mmoe.data.pack import Lengths
from mmoe.data.shards import is_dataset, read_card, read_index, shard_name
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
        UserError: there is no such data set, or its index cannot be read.
    """

    def __init__(self, path: Path, name: str) -> None:
        if not is_dataset(path):
            parts = Path(name).parts
            root = path.parents[len(parts) - 1]
            raise UserError("the data set is missing", str(path), f"make it with `mmoe data prepare {parts[0]} {root}`")
        read_card(path)
        self.path, self.name = path, name
        self._index = read_index(path)
        if not len(self):
            raise UserError("the data set has no samples", str(path), "prepare it again")
        self.tokenizer = str(self._index["tokenizer"])
        """SHA-256 of the tokenizer that the lengths are counted with."""
        self._files: dict[int, int] = {}

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
        index = self._index
        shard = int(index["shard"][number])
        record = self._pread(shard, int(index["json_offset"][number]), int(index["json_length"][number]))
        try:
            sample = json.loads(record.decode())
        except UnicodeDecodeError as error:
            raise BadSample(f"the record is not UTF-8: {error.reason} at byte {error.start}") from None
        except (ValueError, RecursionError) as error:
            raise BadSample(f"the record is no JSON: {error}") from None
        if not isinstance(sample, dict):
            raise BadSample("the record is no JSON object")
        members = range(int(index["image_start"][number]), int(index["image_start"][number + 1]))
        images = [self._pread(shard, int(index["image_offset"][i]), int(index["image_length"][i])) for i in members]
        return Encoded(record=sample, images=tuple(images))

    def _pread(self, shard: int, offset: int, length: int) -> bytes:
        name = shard_name(shard)
        try:
            if shard not in self._files:
                self._files[shard] = os.open(self.path / name, os.O_RDONLY)
            data = os.pread(self._files[shard], length, offset)
        except OSError as error:
            raise BadSample(f"cannot read {name}: {error.strerror}") from None
        if len(data) < length:
            raise BadSample(f"{name} is truncated: {length} bytes wanted at {offset}, {len(data)} there")
        return data

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()
