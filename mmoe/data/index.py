"""``index.npz`` and the members that it points at, as somebody else's files: nothing that they announce is believed
before it is compared with what is there."""

import contextlib
import math
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.lib import format as npy

from mmoe import reading
from mmoe.data.document import BadSample
from mmoe.data.shards import FORMAT, INDEX, Sample, read_card, shard_name
from mmoe.errors import UserError

LONGEST_KEY = 100
"""Bytes; a name in a USTAR header has no more."""
LARGEST_RECORD = 1 << 24
"""Bytes of a sample's JSON."""
LARGEST_IMAGE = 1 << 29
"""Bytes of an encoded image: 64 million pixels of four 16-bit channels, without compression."""
_PER_SAMPLE = {
    "shard": np.int32,
    "json_offset": np.int64,
    "json_length": np.int32,
    "prefix_tokens": np.int32,
    "branch_tokens": np.int32,
}
_PER_IMAGE = {"image_offset": np.int64, "image_length": np.int32}
_DTYPES = {**_PER_SAMPLE, **_PER_IMAGE, "image_start": np.int64, "format": np.int32}
_NAMES = {*_DTYPES, "key", "tokenizer"}
_UNREADABLE = (
    *(OSError, ValueError, EOFError, MemoryError, OverflowError, RuntimeError),
    *(SyntaxError, TokenError, zipfile.BadZipFile),
)
"""What zipfile and numpy's headers, which are Python literals, raise on hostile bytes."""


def read_index(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the data set at ``path``, in memory and consistent with each other and with the card: every member
    lies within its shard's bytes there. `data/FORMAT.md` lists them.

    Raises:
        UserError: there is no data set, or its index is unreadable or inconsistent.
    """
    card, arrays = read_card(path), read_arrays(path)
    problem = next(problems(card, arrays), None)
    if problem:
        raise UserError(f"the index does not fit: {problem}", str(path / INDEX), "prepare the data set again")
    return arrays


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of ``index.npz`` as they are, in no more memory than the file has bytes.

    Raises:
        UserError: the file is unreadable.
    """
    try:
        with open(reading.open_regular(path / INDEX), "rb") as file, zipfile.ZipFile(file) as parts:
            members = [part for part in parts.infolist() if part.filename.removesuffix(".npy") in _NAMES]
            names = [part.filename.removesuffix(".npy") for part in members]
            if len(names) > len(set(names)):
                raise ValueError("an array is there twice")
            if sum(part.file_size for part in members) > os.fstat(file.fileno()).st_size:
                raise ValueError("its arrays are larger than the file")
            return {part.filename.removesuffix(".npy"): _array(parts, part) for part in members}
    except _UNREADABLE as error:
        raise UserError(f"unreadable index: {error}", str(path / INDEX), "prepare the data set again") from error


def _array(parts: zipfile.ZipFile, part: zipfile.ZipInfo) -> np.ndarray:
    """One array, whose size is known from the archive's directory and its header before it is read."""
    if part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size:
        raise ValueError(f"{part.filename} is compressed, which the writer never does")
    with parts.open(part) as file:
        if npy.read_magic(file) != (1, 0):
            raise ValueError(f"{part.filename} is not as numpy writes it")
        shape, _, dtype = npy.read_array_header_1_0(file)
        if dtype.kind not in "iuSUf" or not dtype.itemsize:
            raise ValueError(f"{part.filename} holds {dtype}, not numbers or text")
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or size != part.file_size - file.tell():
            raise ValueError(f"{part.filename} announces {shape} {dtype} and has {part.file_size} bytes")
        data = file.read(size)
    if len(data) != size:
        raise ValueError(f"{part.filename} is truncated")
    return np.frombuffer(data, dtype).reshape(shape) if size else np.zeros(shape, dtype)


def problems(card: dict[str, Any], index: dict[str, np.ndarray]) -> Iterator[str]:
    """What is wrong with an index: arrays that are missing, of another type, do not fit each other or the card."""
    if missing := sorted(_NAMES - index.keys()):
        yield f"no array {', '.join(missing)}"
        return
    for name, dtype in _DTYPES.items():
        if index[name].dtype != dtype:
            yield f"{name} is {index[name].dtype}, expected {np.dtype(dtype)}"
            return
    key, tokenizer = index["key"], index["tokenizer"]
    if key.ndim != 1 or key.dtype.kind != "S" or tokenizer.shape != () or tokenizer.dtype.kind != "U":
        yield "key must be a list of bytes, and tokenizer a text"
        return
    samples, images = len(key), index["image_offset"].size
    shapes = {
        **dict.fromkeys(_PER_SAMPLE, (samples,)),
        **dict.fromkeys(_PER_IMAGE, (images,)),
        "image_start": (samples + 1,),
        "format": (),
    }
    wrong = [name for name, shape in shapes.items() if index[name].shape != shape]
    starts = index["image_start"]
    if wrong == ["image_start"] or not (wrong or _shares(starts, images)):
        yield f"image_start does not share out {images} images among {samples} samples"
    elif wrong:
        yield f"{wrong[0]} has shape {index[wrong[0]].shape}, expected {shapes[wrong[0]]}"
    elif int(index["format"]) != FORMAT:
        yield f"its format is {index['format']}, expected {FORMAT}"
    elif samples != card["samples"]:
        yield f"{samples} samples, the card says {card['samples']}"
    elif str(tokenizer) != card["tokenizer"]:
        yield "its tokenizer is not the card's"
    else:
        yield from _values(card, index)


def _shares(starts: np.ndarray, images: int) -> bool:
    return bool(starts[0] == 0 and starts[-1] == images and np.all(starts[:-1] <= starts[1:]))


def _values(card: dict[str, Any], index: dict[str, np.ndarray]) -> Iterator[str]:
    key, shard, shards = index["key"], index["shard"], card["shard"]
    if len(key) and not _plain(key):
        yield f"a key holds letters, digits, - and _ only, at most {LONGEST_KEY}"
        return
    for name in ("shard", "prefix_tokens", "branch_tokens"):
        if np.any(index[name] < 0):
            yield f"{name} is negative at {_name(key, index[name] < 0)}"
            return
    if np.any(shard >= len(shards)):
        yield f"{_name(key, shard >= len(shards))} is in shard {int(shard.max())} of {len(shards)}"
        return
    room = np.array([entry["bytes"] for entry in shards], np.int64)
    owner = np.repeat(np.arange(len(key)), np.diff(index["image_start"]))
    for part, of in (("json", slice(None)), ("image", owner)):
        offset, length, ends = index[f"{part}_offset"], index[f"{part}_length"], room[shard][of]
        # Subtracted, not added: a sum of hostile numbers wraps around.
        outside = (offset < 0) | (length < 0) | (length > ends) | (offset > ends - length)
        if np.any(outside):
            yield f"the {part} of {_name(key[of], outside)} lies outside of its shard"
            return
    # Members that overlap would make of a small file as many bytes as there are samples.
    used = np.zeros(len(shards), np.int64)
    np.add.at(used, shard, index["json_length"])
    np.add.at(used, shard[owner], index["image_length"])
    if np.any(used > room):
        number = int(np.argmax(used > room))
        yield f"the members of shard {number} have {used[number]} bytes, the shard {room[number]}"


def _plain(key: np.ndarray) -> bool:
    """Whether every key is one; numpy cuts the zeros at its end."""
    letters = np.zeros(256, bool)
    letters[[*b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"]] = True
    rows = letters[np.ascontiguousarray(key).view(np.uint8).reshape(len(key), -1)]
    lengths = np.char.str_len(key)
    return bool(lengths.min() > 0 and lengths.max() <= LONGEST_KEY and np.all(rows.sum(1) == lengths))


def _name(key: np.ndarray, where: np.ndarray) -> str:
    return key[int(np.argmax(where))].decode()


class Shards:
    """The tars of a data set, opened when first read: regular files, or links to some, as on clusters."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[int, int] = {}

    def read(self, shard: int, offset: int, length: int, largest: int) -> bytes:
        """``length`` bytes at ``offset`` of a tar.

        Raises:
            BadSample: they are not there, or more than ``largest``.
            UserError: the tar cannot be opened, whatever the reason: what it holds is too much to be passed over sample
                by sample.
        """
        name = shard_name(shard)
        if length > largest:
            raise BadSample(f"{length} bytes at {offset} of {name} are more than {largest}")
        if shard not in self._files:
            self._files[shard] = self._open(self.path / name)
        handle = self._files[shard]
        try:
            there = max(0, os.fstat(handle).st_size - offset)
            data = os.pread(handle, min(length, there), offset)
        except OSError as error:
            raise BadSample(f"cannot read {name}: {error.strerror}") from None
        if len(data) < length:
            raise BadSample(f"{name} is truncated: {length} bytes wanted at {offset}, {len(data)} there")
        return data

    def _open(self, file: Path) -> int:
        try:
            return reading.open_regular(file)
        except FileNotFoundError:
            what, fix = "is gone", "bring it back, or prepare the data set again, and go on with --resume"
        except (OSError, ValueError) as error:
            what = f"cannot be opened: {error.strerror if isinstance(error, OSError) else error}"
            fix = "make it a readable file, or a link to one, and go on with --resume"
        raise UserError(f"a shard of the data set {what}", str(file), fix)

    def record(self, index: dict[str, np.ndarray], number: int) -> dict[str, Any]:
        """The record of a sample.

        Raises:
            BadSample: its bytes are not there, or it is not a JSON object in UTF-8.
        """
        place = int(index["json_offset"][number]), int(index["json_length"][number])
        content = self.read(int(index["shard"][number]), *place, LARGEST_RECORD)
        try:
            return reading.json_object(content.decode())
        except UnicodeDecodeError as error:
            raise BadSample(f"the record is not UTF-8: {error.reason} at byte {error.start}") from None
        except ValueError as error:
            raise BadSample(f"the record is no JSON: {error}") from None

    def sample(self, index: dict[str, np.ndarray], number: int) -> tuple[dict[str, Any], list[bytes]]:
        """The record and the encoded images of a sample.

        Raises:
            BadSample: see :meth:`record`; or an image's bytes are not there.
        """
        record, shard = self.record(index, number), int(index["shard"][number])
        members = range(int(index["image_start"][number]), int(index["image_start"][number + 1]))
        places = [(int(index["image_offset"][i]), int(index["image_length"][i])) for i in members]
        return record, [self.read(shard, *place, LARGEST_IMAGE) for place in places]

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()


def read_sample(path: Path, index: dict[str, np.ndarray], number: int) -> Sample:
    """Sample ``number`` of a data set, for tools; training reads through its own loader.

    The images' suffixes are not in the index and come back as ``""``.

    Raises:
        BadSample: see :meth:`Shards.sample`.
    """
    with contextlib.closing(Shards(path)) as shards:
        record, images = shards.sample(index, number)
    return Sample(index["key"][number].decode(), record, [("", image) for image in images])
