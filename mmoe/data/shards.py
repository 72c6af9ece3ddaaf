"""The data set format on disk: WebDataset tars, ``index.npz``, ``dataset.toml``. `data/FORMAT.md` describes it."""

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tokenizers import Tokenizer

from mmoe import reading
from mmoe.data.tokenizer import encode
from mmoe.errors import UserError

FORMAT = 1
INDEX, CARD = "index.npz", "dataset.toml"
LARGEST_CARD = 1 << 25
"""Bytes."""
_CARD = {"samples": int, "samples_per_shard": int, "skipped": list, "shard": list} | dict.fromkeys(
    ("name", "source", "license", "tokenizer", "fingerprint"), str
)
_SHARD = {"file": str, "bytes": int, "sha256": str}


@dataclass(frozen=True)
class Sample:
    """One sample before it is written: its key, its JSON record and the bytes of its images, in order.

    Attributes:
        key: unique in the data set; letters, digits, ``-`` and ``_``.
        record: see `data/FORMAT.md`.
        images: pairs of file suffix (``"jpg"``, ``"png"``) and the encoded image.
    """

    key: str
    record: dict[str, Any]
    images: list[tuple[str, bytes]] = field(default_factory=list)


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def text_tokens(record: dict[str, Any], count: Callable[[str], int]) -> tuple[int, int]:
    """Text tokens of a sample in its prefix and in its branches.

    The document made of it has ``1 + images * image_tokens + prefix + branches`` tokens: the 1 is its ``<bos>``, and a
    branch is its prompt, its answer and an ``<eos>``.

    Args:
        record: the sample's JSON record.
        count: number of tokens of a text.
    """
    prefix = sum(count(part["text"]) for part in record["prefix"] if "text" in part)
    branches = sum(count(branch["prompt"]) + count(branch["answer"]) + 1 for branch in record["branches"])
    return prefix, branches


def _add(file: BinaryIO, name: str, content: bytes) -> int:
    """Append one member to an open tar; returns the offset of its content in bytes."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    file.write(header.tobuf(tarfile.USTAR_FORMAT))
    offset = file.tell()
    file.write(content)
    file.write(bytes(-len(content) % tarfile.BLOCKSIZE))
    return offset


def write_shard(path: Path, samples: Iterable[Sample], count: Callable[[str], int]) -> None:
    """Write one tar and, as ``PATH.npz``, its part of the index; both appear whole or not at all.

    Args:
        path: of the tar.
        samples: in the order of the data set.
        count: number of tokens of a text.
    """
    keys, spans, tokens, images_per_sample, image_spans = [], [], [], [], []
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("wb") as file:
        for sample in samples:
            content = json.dumps(sample.record, ensure_ascii=False, separators=(",", ":")).encode()
            keys.append(sample.key)
            spans.append((_add(file, f"{sample.key}.json", content), len(content)))
            tokens.append(text_tokens(sample.record, count))
            images_per_sample.append(len(sample.images))
            for number, (suffix, image) in enumerate(sample.images):
                image_spans.append((_add(file, f"{sample.key}.{number}.{suffix}", image), len(image)))
        file.write(bytes(2 * tarfile.BLOCKSIZE))
    digest = hashlib.sha256(partial.read_bytes()).hexdigest()
    json_spans = np.array(spans, np.int64).reshape(-1, 2)
    pictures = np.array(image_spans, np.int64).reshape(-1, 2)
    counts = np.array(tokens, np.int32).reshape(-1, 2)
    part = io.BytesIO()
    np.savez(
        part,
        key=np.array(keys, "S"),
        json_offset=json_spans[:, 0],
        json_length=json_spans[:, 1].astype(np.int32),
        images=np.array(images_per_sample, np.int32),
        image_offset=pictures[:, 0],
        image_length=pictures[:, 1].astype(np.int32),
        prefix_tokens=counts[:, 0],
        branch_tokens=counts[:, 1],
        sha256=np.array(digest),
    )
    partial.replace(path)
    _write(path.with_suffix(".npz"), part.getvalue())


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


@dataclass(frozen=True)
class Description:
    """What a data set is: everything its bytes depend on. Equal descriptions are equal data sets.

    Attributes:
        name: e.g. ``"scenes/train"``.
        source: name of the source card.
        license: SPDX identifier.
        samples: how many.
        samples_per_shard: all shards but the last hold this many.
        tokenizer: hash of the tokenizer that the token counts are of.
        recipe: the writer's version and options, flat.
    """

    name: str
    source: str
    license: str
    samples: int
    samples_per_shard: int
    tokenizer: str
    recipe: dict[str, str | int]

    @property
    def fingerprint(self) -> str:
        content = json.dumps([FORMAT, self.__dict__], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def shards(self) -> list[range]:
        """The samples of each shard."""
        step = self.samples_per_shard
        return [range(start, min(start + step, self.samples)) for start in range(0, self.samples, step)]


class DatasetWriter:
    """Builds one data set beside its final place and moves it there when all of it is written.

    Shards that an interrupted run of the same description finished are kept: write only those in :attr:`missing`.
    """

    def __init__(self, out: Path, description: Description) -> None:
        self.out, self.description = out, description
        self.folder = out.with_name(f".{out.name}.{description.fingerprint[:12]}.tmp")

    @property
    def up_to_date(self) -> bool:
        """Whether ``out`` already is this data set.

        Raises:
            UserError: there is one that cannot be read, or something else: :meth:`finish` would remove it.
        """
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return False
        try:
            return read_card(self.out)["fingerprint"] == self.description.fingerprint
        except UserError as error:
            raise UserError(error.what, error.where or str(self.out), "move it away, then prepare again") from None

    @property
    def missing(self) -> list[int]:
        """Numbers of the shards that are still to be written to :attr:`folder`."""
        numbers = range(len(self.description.shards))
        return [n for n in numbers if not (self.folder / shard_name(n)).with_suffix(".npz").is_file()]

    def open(self) -> None:
        """Make the folder and remove what runs of other descriptions left unfinished."""
        for stale in self.out.parent.glob(f".{self.out.name}.*.tmp"):
            if stale != self.folder:
                shutil.rmtree(stale)
        self.folder.mkdir(parents=True, exist_ok=True)

    def finish(self, skipped: Iterable[str] = ()) -> None:
        """Join the shards' parts of the index, write the card and put the data set in its place.

        Args:
            skipped: what of the source is not in the data set, each with the reason.
        """
        parts_of: dict[str, list[np.ndarray]] = {}
        hashes = []
        for number in range(len(self.description.shards)):
            with np.load(self.folder / f"shard-{number:06d}.npz") as part:
                for name in part.files:
                    parts_of.setdefault(name, []).append(part[name])
                hashes.append(str(part["sha256"]))
                parts_of.setdefault("shard", []).append(np.full(len(part["key"]), number, np.int32))
        del parts_of["sha256"]
        arrays: dict[str, Any] = {name: np.concatenate(parts) for name, parts in parts_of.items()}
        arrays["image_start"] = np.concatenate([[0], np.cumsum(arrays.pop("images"))]).astype(np.int64)
        arrays["format"] = np.array(FORMAT, np.int32)
        arrays["tokenizer"] = np.array(self.description.tokenizer)
        index = io.BytesIO()
        np.savez(index, **arrays)
        _write(self.folder / INDEX, index.getvalue())
        _write(self.folder / CARD, self._card(hashes, list(skipped)).encode())
        for part in self.folder.glob("shard-*.npz"):
            part.unlink()
        if self.out.exists():
            shutil.rmtree(self.out)
        self.folder.rename(self.out)

    def _card(self, hashes: list[str], skipped: list[str]) -> str:
        own = self.description
        values = {
            "format": FORMAT,
            "name": own.name,
            "source": own.source,
            "license": own.license,
            "samples": own.samples,
            "samples_per_shard": own.samples_per_shard,
            "tokenizer": own.tokenizer,
            "fingerprint": own.fingerprint,
        }
        # JSON strings, numbers and lists of strings are TOML too.
        lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
        lines += [f"skipped = {json.dumps(skipped, ensure_ascii=False)}", "", "[recipe]"]
        lines += [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in own.recipe.items()]
        for number, digest in enumerate(hashes):
            size = (self.folder / shard_name(number)).stat().st_size
            lines += ["", "[[shard]]", f'file = "{shard_name(number)}"', f"bytes = {size}", f'sha256 = "{digest}"']
        return "\n".join(lines) + "\n"


def is_dataset(path: Path) -> bool:
    return (path / INDEX).is_file() and (path / CARD).is_file()


def read_card(path: Path) -> dict[str, Any]:
    """The ``dataset.toml`` of a data set.

    Raises:
        UserError: the folder is no data set, its format is not :data:`FORMAT`, or a field is missing or of another
            type.
    """
    if not is_dataset(path):
        raise UserError("no data set here", str(path), "make it with `mmoe data prepare`")
    try:
        card = reading.toml(reading.text(path / CARD, LARGEST_CARD))
    except (OSError, ValueError) as error:
        raise UserError(f"unreadable card: {error}", str(path / CARD), "prepare the data set again") from error
    if card.get("format") != FORMAT:
        raise UserError(f"data set format {card.get('format')!r}, expected {FORMAT}", str(path), "prepare it again")
    card.setdefault("shard", [])
    entries = card["shard"] if isinstance(card["shard"], list) else []  # else the first of the tables says so
    tables = [(card, _CARD), *((entry, _SHARD) for entry in entries)]
    for table, fields in tables:
        for name, kind in fields.items():
            value: Any = table.get(name) if isinstance(table, dict) else None
            if type(value) is not kind or (kind is int and value < 0):
                what = f"unreadable card: {name} is {value!r}, not a {'number' if kind is int else kind.__name__}"
                raise UserError(what, str(path / CARD), "prepare the data set again")
    return card


def token_counter(tokenizer: Tokenizer) -> Callable[[str], int]:
    """Number of tokens of a text, remembered: prompts and answers repeat."""
    known: dict[str, int] = {}

    def count(text: str) -> int:
        if text not in known:
            known[text] = len(encode(tokenizer, text))
        return known[text]

    return count
