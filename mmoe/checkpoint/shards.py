"""A checkpoint's ``state`` folder (Megatron's torch_dist) read and written a stretch of a tensor at a time.

A tensor of a model is a part of a global one: that of all layers, behind the index of its own. The global one lies in
chunks, boxes that the ranks of the run wrote, each a torch.save of its own within a ``*.distcp`` file.
"""

import io
import math
import os
import pickle
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata

from mmoe import reading
from mmoe.checkpoint import layout
from mmoe.checkpoint.stream import File, Stretch
from mmoe.checkpoint.tensors import Spec, Tensors, fill
from mmoe.errors import UserError
from mmoe.parallel import pickles, state
from mmoe.parallel.state import Place

LARGEST_CHUNK = 1 << 30
"""Bytes of a tensor that are written as one chunk: whoever loads it holds one whole."""
ALIGNMENT = 64
"""Bytes, as in torch.save's archives."""


class Box(NamedTuple):
    """Elements of a tensor: in each dimension those from ``offsets`` on, ``sizes`` many."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def common(self, other: "Box") -> "Box | None":
        starts = tuple(map(max, self.offsets, other.offsets))
        ends = [
            min(a + n, b + m) for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        ]
        sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return None if any(size <= 0 for size in sizes) else Box(starts, sizes)

    def within(self, other: "Box") -> tuple[slice, ...]:
        """It as slices of ``other``."""
        starts = [a - b for a, b in zip(self.offsets, other.offsets, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.sizes, strict=True))


@dataclass(frozen=True)
class _Chunk:
    box: Box
    """In the tensor of one layer."""
    file: Path
    start: int
    """Byte of the file where its torch.save begins."""
    length: int


class Shards(Tensors):
    """The tensors of a checkpoint by the names that they have in a model on one process."""

    def __init__(self, folder: Path, places: Mapping[str, Place], fingerprint: str) -> None:
        """
        Args:
            folder: a checkpoint's ``state``; nothing in its files is called.
            places: of the tensors to read.
            fingerprint: equal as long as the checkpoint is.

        Raises:
            UserError: a tensor is missing or of another shape, or the index of the tensors is something else.
        """
        self.folder, self.places, self.known = folder, places, fingerprint
        pickles.check(folder)
        self.begins: dict[_Chunk, int] = {}
        self.specs: dict[str, Spec] = {}
        try:
            with open(reading.open_regular(folder / pickles.METADATA), "rb") as file:
                self._index(pickles.load_metadata(file))
        except (AttributeError, TypeError) as error:
            raise UserError(f"the index of tensors is something else: {error}", str(folder), pickles.FIX) from None

    def _index(self, index: metadata.Metadata) -> None:
        folder, places = self.folder, self.places
        for name, (key, leading, _, tensor) in places.items():
            found = index.state_dict_metadata.get(key)
            if not isinstance(found, metadata.TensorStorageMetadata):
                raise UserError(f"the state has no tensor {key}", str(folder), pickles.FIX)
            if not isinstance(found.properties.dtype, torch.dtype):
                raise TypeError(f"{key} has no dtype")
            if tuple(found.size)[len(leading) :] != tuple(tensor.shape):
                what = f"tensor {key} is {list(found.size)}, {name} is {list(tensor.shape)} by the recipe"
                raise UserError(what, str(folder), "the weights do not fit the recipe")
            self.specs[name] = Spec(tensor.shape, found.properties.dtype)
        self.chunks = {key: _chunks(folder, index, key) for key in {place.key for place in places.values()}}
        for name, (key, leading, _, tensor) in places.items():
            if not _tile((chunk.box for chunk in self.chunks[key].get(leading, ())), tensor.shape):
                what = f"the chunks of tensor {name} do not have each of its elements once"
                raise UserError(what, str(folder), pickles.FIX)

    def fingerprint(self) -> str:
        return self.known

    def read(self, name: str, start: int, out: Tensor) -> None:
        spec, place = self.specs[name], self.places[name]
        chunks = self.chunks[place.key].get(place.leading, [])
        try:
            for first, box in boxes(spec.shape, start, out.numel()):
                into = out[first : first + math.prod(box.sizes)].view(box.sizes)
                for chunk in chunks:
                    common = box.common(chunk.box)
                    if common is not None:
                        self._copy(chunk, spec, common, into[common.within(box)])
        except (OSError, ValueError, pickle.UnpicklingError) as error:
            raise layout.Unreadable(f"tensor {name} cannot be read: {error}", str(self.folder), pickles.FIX) from None

    def _copy(self, chunk: _Chunk, spec: Spec, box: Box, out: Tensor) -> None:
        """The elements of ``box``, which lie side by side in ``chunk``."""
        if chunk not in self.begins:
            self.begins[chunk] = _begin(chunk, spec.dtype)
        first = sum(
            (a - b) * math.prod(chunk.box.sizes[axis + 1 :])
            for axis, (a, b) in enumerate(zip(box.offsets, chunk.box.offsets, strict=True))
        )
        into = out.reshape(-1) if out.is_contiguous() else torch.empty(out.numel(), dtype=out.dtype)
        handle = reading.open_regular(chunk.file)
        try:
            fill(handle, self.begins[chunk] + first * spec.dtype.itemsize, into)
        finally:
            os.close(handle)
        if not out.is_contiguous():
            out.copy_(into.view(out.shape))


def _begin(chunk: _Chunk, dtype: torch.dtype) -> int:
    """Byte of the file where the elements begin.

    Raises:
        ValueError: they are others than the index tells of, or not in row-major order, in which every writer of ours
            has them: a stretch of the tensor would be all over the chunk.
    """
    with open(reading.open_regular(chunk.file), "rb") as file:
        tensor, start = pickles.place(_Window(file, chunk.start, chunk.length))
    elements = tensor.untyped_storage().nbytes() // dtype.itemsize
    if tuple(tensor.shape[-len(chunk.box.sizes) or tensor.ndim :]) != chunk.box.sizes or tensor.dtype != dtype:
        raise ValueError(
            f"a chunk is {list(tensor.shape)} {tensor.dtype}, in the index {list(chunk.box.sizes)} {dtype}"
        )
    if tensor.numel() != elements or tensor.storage_offset() or start + elements * dtype.itemsize > chunk.length:
        raise ValueError("a chunk has not the size that the index tells of")
    if not tensor.is_contiguous():
        raise ValueError("the elements of a chunk are not in row-major order")
    return chunk.start + start


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self.file, self.start, self.length, self.place = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.length}[whence]
        return self.place

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self.length - self.place))
        data = os.pread(self.file.fileno(), count, self.start + self.place)
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)


def _chunks(folder: Path, index: metadata.Metadata, key: str) -> dict[tuple[int, ...], list[_Chunk]]:
    """The chunks of a global tensor by the layers in front.

    Raises:
        TypeError: the index tells of a chunk without a place, or of one that is none.
    """
    found: dict[tuple[int, ...], list[_Chunk]] = defaultdict(list)
    tensor: Any = index.state_dict_metadata[key]
    for chunk in tensor.chunks:
        storage = index.storage_data.get(metadata.MetadataIndex(key, chunk.offsets))
        numbers = [*chunk.offsets, *chunk.sizes, *([storage.offset, storage.length] if storage else [-1])]
        if len(chunk.offsets) != len(tensor.size) or len(chunk.sizes) != len(tensor.size):
            raise TypeError(f"a chunk of {key} has other dimensions")
        if any(type(number) is not int or number < 0 for number in numbers):
            raise TypeError(f"a chunk of {key} has no place")
        path = folder / storage.relative_path
        for layers in range(len(chunk.sizes) + 1):
            box = Box(tuple(chunk.offsets[layers:]), tuple(chunk.sizes[layers:]))
            found[tuple(chunk.offsets[:layers])].append(_Chunk(box, path, storage.offset, storage.length))
            if layers < len(chunk.sizes) and chunk.sizes[layers] != 1:
                break
    return found


def _tile(parts: Iterable[Box], shape: Sequence[int]) -> bool:
    """Whether each element of a tensor is in one of the ``parts``, and nothing else is.

    The indicator of a box is the sum over its corners, signed by the parity of their far sides, of the indicators of
    what lies behind them; these are independent, so parts tile the whole where the signs at each corner sum to its.
    Linear in the parts, however hostile they are.
    """
    signs: Counter[tuple[int, ...]] = Counter()

    def add(box: Box, sign: int) -> None:
        for sides in product((0, 1), repeat=len(box.sizes)):
            corner = tuple(a + n * side for a, n, side in zip(box.offsets, box.sizes, sides, strict=True))
            signs[corner] += -sign if sum(sides) % 2 else sign

    add(Box((0,) * len(shape), tuple(shape)), -1)
    for part in parts:
        add(part, 1)
    return not any(signs.values())


def boxes(shape: Sequence[int], start: int, count: int) -> Iterator[tuple[int, Box]]:
    """The elements ``start`` to ``start + count`` in row-major order, in boxes whose elements lie side by side, each
    with its place among them."""

    def cut(index: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
        axis = len(index)
        if axis == len(shape):
            yield Box(index, (1,) * axis)
            return
        row = math.prod(shape[axis + 1 :])
        first, last = -(-start // row), stop // row
        if first > last:  # a part of one row
            yield from cut((*index, last), start - last * row, stop - last * row)
            return
        if start < first * row:
            yield from cut((*index, first - 1), start - (first - 1) * row, row)
        if first < last:
            rest = tuple(shape[axis + 1 :])
            yield Box((*index, first, *(0 for _ in rest)), (*(1 for _ in index), last - first, *rest))
        if last * row < stop:
            yield from cut((*index, last), 0, stop - last * row)

    place = 0
    for box in cut((), start, start + count) if count else ():
        yield place, box
        place += math.prod(box.sizes)


@dataclass
class Plan:
    """The files of a new checkpoint's tensors, and what its index says of them."""

    files: list[File]
    tensors: dict[str, metadata.TensorStorageMetadata]
    storage: dict[metadata.MetadataIndex, filesystem._StorageInfo]


def plan(places: Mapping[str, Place], source: Tensors, folder: str, largest: int) -> Plan:
    """How the tensors of ``source``, which has one for each of ``places``, lie in files of about ``largest`` bytes.

    Args:
        places: where each tensor stands in the state; ``source`` has its shape and dtype.
        source: the tensors.
        folder: the ``state`` folder, from the checkpoint's.
        largest: bytes; a file has more where one chunk has.
    """
    made = Plan([], {}, {})
    parts: list[bytes | Stretch] = []
    size = 0

    def close() -> None:
        nonlocal parts, size
        if parts:
            made.files.append(File(f"{folder}/{_file_name(len(made.files))}", source, parts))
        parts, size = [], 0

    for name, place in places.items():
        spec = source.specs[name]
        properties = metadata.TensorProperties(dtype=spec.dtype)
        tensor = made.tensors.setdefault(
            place.key, metadata.TensorStorageMetadata(properties, torch.Size(place.whole), [])
        )
        row = spec.nbytes // max(1, spec.shape[0]) if spec.shape else spec.nbytes
        for first, rows in _rows(spec.shape, max(1, LARGEST_CHUNK // max(1, row))):
            sizes = torch.Size([rows, *spec.shape[1:]] if spec.shape else [])
            before, behind = _archive(torch.Size([*(1 for _ in place.leading), *sizes]), spec.dtype)
            elements = math.prod(sizes)
            length = len(before) + elements * spec.dtype.itemsize + len(behind)
            if parts and size + length > largest:
                close()
            offsets = torch.Size([*place.leading, *([first, *(0 for _ in sizes[1:])] if sizes else [])])
            chunk = metadata.ChunkStorageMetadata(offsets, torch.Size([*(1 for _ in place.leading), *sizes]))
            tensor.chunks.append(chunk)
            where = filesystem._StorageInfo(_file_name(len(made.files)), size, length)
            made.storage[metadata.MetadataIndex(place.key, offsets)] = where
            filler = bytes(-length % ALIGNMENT)
            start = first * math.prod(spec.shape[1:])
            parts += [before, Stretch(name, start, elements), behind + filler]
            size += length + len(filler)
    close()
    return made


def _rows(shape: torch.Size, most: int) -> Iterator[tuple[int, int]]:
    """First rows and numbers of rows, at most ``most``, that make up a tensor."""
    count = shape[0] if shape else 1
    for first in range(0, count, most):
        yield first, min(most, count - first)


def _file_name(number: int) -> str:
    """As if a second rank wrote the tensors: Megatron's first one writes what is no tensor."""
    return f"__1_{number}.distcp"


@cache
def _archive(shape: torch.Size, dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What torch.save writes before and behind the elements of a tensor."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "archive"
        with torch.serialization.skip_data():  # a hole in their place
            torch.save(torch.empty(shape, dtype=dtype), path)
        with path.open("rb") as file:
            tensor, start = pickles.place(file)
            file.seek(0)
            before = file.read(start)
            file.seek(start + tensor.nbytes)
            return before, file.read()


def write_index(folder: Path, model: torch.nn.Module, tensors: Plan) -> None:
    """Writes what is in ``folder`` beside the planned tensors: Megatron does, for a state without any, and its index
    gets theirs."""
    for left in folder.parent.glob(".index*"):
        shutil.rmtree(left)  # of a process that was killed here: it would be taken for a part of the checkpoint
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".index") as empty:
        rest = Path(empty)
        writing = state.Write(rest, state.objects(model))
        writing.run()
        writing.finish()
        with (rest / pickles.METADATA).open("rb") as file:
            index = pickles.load_metadata(file)
        index.state_dict_metadata.update(tensors.tensors)
        index.storage_data.update(tensors.storage)
        with (rest / pickles.METADATA).open("wb") as file:
            pickle.dump(index, file)
        for path in rest.iterdir():
            path.replace(folder / path.name)
