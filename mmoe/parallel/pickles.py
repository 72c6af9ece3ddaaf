"""A checkpoint's files read as data: of what the pickles in Megatron's torch_dist name, only plain types are made.

``.metadata`` is a pickle and is read by a loader with the list below. ``common.pt`` and the objects in ``*.distcp`` are
torch.save's; torch reads them with its own list (``weights_only``), which upstream switches off in one place.
"""

import io
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, ClassVar

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.api import CheckpointException
from torch.serialization import _get_layout

from mmoe import reading
from mmoe.errors import UserError

METADATA, COMMON = ".metadata", "common.pt"
FIX = "take the checkpoint from whoever wrote it again; do not load this one by other means"
_DATA = (
    *(metadata.Metadata, metadata.MetadataIndex, metadata.StorageMeta),
    *(metadata.TensorStorageMetadata, metadata.TensorProperties, metadata.ChunkStorageMetadata),
    *(metadata.BytesStorageMetadata, metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo),
    *(planner.SavePlan, planner.WriteItem, planner.WriteItemType, planner.TensorWriteData, planner.BytesIOWriteData),
    torch.Size,
)
_ENUMERATIONS = (metadata._MEM_FORMAT_ENCODING, planner.WriteItemType)
LARGEST = 1 << 31
"""Bytes of ``.metadata``, which has some 200 a tensor."""
_WRONG = (
    *(ArithmeticError, AttributeError, EOFError, ImportError, LookupError, MemoryError, RecursionError, RuntimeError),
    *(TypeError, ValueError, struct.error, zipfile.BadZipFile),
)
"""What unpicklers raise on hostile bytes, beside their own error."""
_Python: Any = pickle._Unpickler
_UNUSED = {
    code[0]
    for code in (
        *(pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.PERSID, pickle.BINPERSID, pickle.INST, pickle.OBJ, pickle.DICT),
        *(pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.NEWOBJ_EX),
        *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
    )
}
"""No index needs them; some hash what they are given, or take the memory that they announce."""
PLAIN: dict[tuple[str, str], Any] = {
    **{(known.__module__, known.__qualname__): known for known in _DATA},
    ("torch.serialization", "_get_layout"): _get_layout,
    **{
        ("torch", str(dtype).removeprefix("torch.")): dtype
        for dtype in vars(torch).values()
        if isinstance(dtype, torch.dtype)
    },
}


def _member(owner: Any, name: Any) -> Any:
    """In place of getattr, by which a member of an enumeration is pickled."""
    if not isinstance(owner, type) or not isinstance(name, str):
        raise pickle.UnpicklingError("it asks for a member of something else than an enumeration")
    if owner not in _ENUMERATIONS or name not in owner.__members__:
        raise pickle.UnpicklingError(f"it asks for {name!r} of {owner!r}")
    return owner[name]


def _plain(value: Any) -> bool:
    """Whether a value can be hashed, compared and printed in no time: of nested tuples 60 bytes take longer than a
    year."""
    if isinstance(value, tuple):
        return all(type(item) in (str, int) for item in value)
    return type(value) in (str, int, bool, type(None))


def _check_key(key: Any) -> None:
    parts = vars(key).values() if type(key) is metadata.MetadataIndex else [key]
    if not all(map(_plain, parts)):
        raise pickle.UnpicklingError("a key is more than names and numbers")


class _Loader(_Python):
    """Python's own unpickler: its memo is a dict, where the one in C takes as much memory as the largest number that a
    file gives to an object. It is slower, 10 s for an index of 100,000 tensors in place of 4."""

    dispatch: ClassVar[dict[int, Any]] = {code: load for code, load in _Python.dispatch.items() if code not in _UNUSED}

    def _setitem(self) -> None:
        _check_key(self.stack[-2])
        self.load_setitem()

    def _setitems(self) -> None:
        for key in self.stack[::2]:
            _check_key(key)
        self.load_setitems()

    def _reduce(self) -> None:
        function, arguments = self.stack[-2:]
        # These look their argument up, which hashes it.
        if (function in (*_ENUMERATIONS, _get_layout)) and not all(map(_plain, arguments)):
            raise pickle.UnpicklingError("an argument is more than names and numbers")
        self.load_reduce()

    def _newobj(self) -> None:
        if self.stack[-2] in _ENUMERATIONS:
            raise pickle.UnpicklingError("it makes a member of an enumeration")
        self.load_newobj()

    def _build(self) -> None:
        if type(self.stack[-2]) not in _DATA:  # a class, above all: its attributes are everybody's
            raise pickle.UnpicklingError("it gives a state to something else than data")
        self.load_build()

    dispatch |= {
        pickle.SETITEM[0]: _setitem,
        pickle.SETITEMS[0]: _setitems,
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _newobj,
        pickle.BUILD[0]: _build,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        try:
            return PLAIN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it names an object elsewhere")


def load_metadata(file: BinaryIO) -> metadata.Metadata:
    """What ``.metadata`` holds; files that it names lie beside it.

    Raises:
        pickle.UnpicklingError: it is something else.
    """
    try:
        content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        # From memory: a file would take as much of it as an object in it announces.
        found = _Loader(io.BytesIO(content)).load()
        for key in (*found.state_dict_metadata, *found.storage_data):
            _check_key(key)  # again: a key that is in a dict already may have been given another state
        places = found.storage_data.values()
        bad = next((place.relative_path for place in places if not _beside(place.relative_path)), None)
    except _WRONG as error:
        raise pickle.UnpicklingError(f"it is no index of tensors: {_reason(error)}") from None
    if bad is not None:
        raise pickle.UnpicklingError(f"it names the file {bad!r}")
    return found


def _reason(error: BaseException) -> str:
    """One line; of torch's page on what it refused, the culprit."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named:
        return f"it names {named[1]}"
    return str(error).partition("\n")[0] or type(error).__name__


def _beside(name: str) -> bool:
    return Path(name).name == name and name not in ("", ".", "..")


def check(folder: Path) -> None:
    """Raises :class:`UserError` where a file of the checkpoint's state would call something, or read elsewhere."""
    try:
        with open(reading.open_regular(folder / METADATA), "rb") as file:
            load_metadata(file)
    except FileNotFoundError:
        raise UserError(f"the state has no {METADATA}", str(folder), FIX) from None
    except (pickle.UnpicklingError, OSError, ValueError) as error:
        raise UserError(f"{METADATA} is not data: {error}", str(folder), FIX) from None
    common = folder / COMMON
    if not os.path.lexists(common):  # Megatron-Core 0.19.2 keeps what is common among the objects
        return
    try:
        with _only_stored():
            torch.load(common, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, OSError, ValueError) as error:
        raise UserError(f"{COMMON} is not data: {_reason(error)}", str(folder), FIX) from None


class _Archive(io.RawIOBase):
    """A file to be looked at: torch's view of a part of a ``*.distcp`` (checkpoint/utils.py:388) takes a place that is
    counted from the end with the wrong sign."""

    def __init__(self, file: Any) -> None:
        self.file = file
        file.seek(0, os.SEEK_END)
        self.end = file.tell()

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self.end}[whence]
        self.file.seek(start + offset)
        return start + offset

    def tell(self) -> int:
        return self.file.tell()

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.end - self.tell())
        return self.file.read(left if size < 0 else min(size, left))


def _check_stored(file: Any) -> None:
    """Raises UnpicklingError where a torch.save'd file is compressed: it could be a thousandth of what it unpacks to.
    What does not begin as an archive is left to torch, which reads its older format then."""
    if isinstance(file, str | os.PathLike):
        with open(reading.open_regular(Path(file)), "rb") as opened:
            _check_stored(opened)
        return
    place = file.tell()
    begins = file.read(4)
    try:
        with zipfile.ZipFile(_Archive(file)) as parts:
            packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        if begins == b"PK\3\4":
            raise pickle.UnpicklingError(f"it is no archive: {error}") from None
        return
    finally:
        file.seek(place)
    if packed:
        raise pickle.UnpicklingError("it is compressed, which torch.save never does")


def place(file: Any) -> tuple[torch.Tensor, int]:
    """A tensor that torch.save wrote to ``file``, on the meta device, and the byte where its data begin.

    Raises:
        pickle.UnpicklingError: it is something else.
    """
    try:
        _check_stored(file)
        found = torch.load(file, map_location="meta", weights_only=True)
        if type(found) is not torch.Tensor:
            raise ValueError("it is no tensor")
        # What torch notes where it reads no data: serialization.py:2096 (2.13).
        storage: Any = found.untyped_storage()
        return found, storage._checkpoint_offset
    except _WRONG as error:
        raise pickle.UnpicklingError(_reason(error)) from None


@contextmanager
def _only_stored() -> Iterator[None]:
    """While it lasts, torch.load refuses archives that are compressed, and whatever it makes of a file that is none of
    torch.save's is an UnpicklingError: upstream reads every tensor and object in
    ``*.distcp`` and the common part through it."""
    load = torch.load

    def checked(f: Any, *args: Any, **kwargs: Any) -> Any:
        _check_stored(f)
        try:
            return load(f, *args, **kwargs)
        except (pickle.UnpicklingError, *_WRONG) as error:
            raise pickle.UnpicklingError(_reason(error)) from None

    setattr(torch, "load", checked)
    try:
        yield
    finally:
        setattr(torch, "load", load)


@contextmanager
def read_as_data(folder: Path) -> Iterator[None]:
    """While it lasts, torch's checkpoint reader unpickles with :func:`load_metadata`, and torch.load plain types only,
    out of archives that are not compressed, whatever its caller asks for.

    Raises:
        UserError: an object in ``folder`` is something else.
    """
    key, before = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", pickle
    asked = os.environ.get(key)
    setattr(filesystem, "pickle", SimpleNamespace(load=load_metadata))
    os.environ[key] = "1"
    try:
        with _only_stored():
            yield
    except CheckpointException as error:
        wrong = [failure for failure, _ in error.failures.values() if isinstance(failure, pickle.UnpicklingError)]
        if not wrong:
            raise
        raise UserError(f"an object in the state is not data: {_reason(wrong[0])}", str(folder), FIX) from None
    finally:
        setattr(filesystem, "pickle", before)
        if asked is None:
            del os.environ[key]
        else:
            os.environ[key] = asked
