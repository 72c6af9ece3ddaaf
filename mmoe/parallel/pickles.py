"""A checkpoint's files read as data: of what the pickles in Megatron's torch_dist name, only plain types are made.

``.metadata`` is a pickle and is read by a loader with the list below. ``common.pt`` and the objects in ``*.distcp`` are
torch.save's; torch reads them with its own list (``weights_only``), which upstream switches off in one place.
"""

import io
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.api import CheckpointException
from torch.serialization import _get_layout

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
    if owner not in _ENUMERATIONS or name not in owner.__members__:
        raise pickle.UnpicklingError(f"it asks for {name!r} of {owner!r}")
    return owner[name]


class _Loader(pickle.Unpickler):
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
        found = _Loader(file).load()
        places = found.storage_data.values()
        bad = next((place.relative_path for place in places if not _beside(place.relative_path)), None)
    except (AttributeError, EOFError, ImportError, IndexError, KeyError, TypeError, ValueError) as error:
        raise pickle.UnpicklingError(f"it is no index of tensors: {error}") from None
    if bad is not None:
        raise pickle.UnpicklingError(f"it names the file {bad!r}")
    return found


def _beside(name: str) -> bool:
    return Path(name).name == name and name not in ("", ".", "..")


def check(folder: Path) -> None:
    """Raises :class:`UserError` where a file of the checkpoint's state would call something, or read elsewhere."""
    try:
        with (folder / METADATA).open("rb") as file:
            load_metadata(file)
    except FileNotFoundError:
        raise UserError(f"the state has no {METADATA}", str(folder), FIX) from None
    except pickle.UnpicklingError as error:
        raise UserError(f"{METADATA} is not data: {error}", str(folder), FIX) from None
    common = folder / COMMON
    if not common.is_file():  # Megatron-Core 0.19.2 keeps what is common among the objects
        return
    try:
        with _only_stored():
            torch.load(common, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError) as error:
        raise UserError(f"{COMMON} is not data: {str(error).splitlines()[0]}", str(folder), FIX) from None


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
        with open(file, "rb") as opened:
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


@contextmanager
def _only_stored() -> Iterator[None]:
    """While it lasts, torch.load refuses archives that are compressed: upstream reads every tensor and object in
    ``*.distcp`` and the common part through it."""
    load = torch.load

    def checked(f: Any, *args: Any, **kwargs: Any) -> Any:
        _check_stored(f)
        return load(f, *args, **kwargs)

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
        named = next((line for line in str(wrong[0]).splitlines() if "GLOBAL" in line), str(wrong[0]).splitlines()[0])
        raise UserError(f"an object in the state is not data: {named}", str(folder), FIX) from None
    finally:
        setattr(filesystem, "pickle", before)
        if asked is None:
            del os.environ[key]
        else:
            os.environ[key] = asked
