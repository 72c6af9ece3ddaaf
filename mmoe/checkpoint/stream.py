"""Files written out of tensors that are read a stretch at a time: bounded memory, and a broken-off write goes on.

One thread reads ahead, one hashes, this one writes. A file has its name once it is whole and on the disk; the folder's
journal has its size and checksum, and a write that starts again keeps the files for which these hold.
"""

import errno
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch

from mmoe import reading
from mmoe.checkpoint import layout
from mmoe.checkpoint.tensors import Tensors, memory
from mmoe.errors import UserError

PIECE, PIECES = 16 << 20, 4
"""Bytes that are read, written and hashed at a time, and how many of them are under way."""
BLOCK = 1 << 20
"""Bytes: so many zeros are not written, the file has a hole there, which reads as zeros."""
SECTOR = 4096
"""Bytes, of which direct writes are a multiple."""
JOURNAL = ".conversion.json"
LARGEST_JOURNAL = 1 << 26


class Stretch(NamedTuple):
    """``count`` elements of a tensor in row-major order, from the one numbered ``start``."""

    name: str
    start: int
    count: int


@dataclass(frozen=True)
class File:
    """What a file holds, one part after another; the stretches are those of ``source``."""

    path: str
    """In the folder that is written."""
    source: Tensors
    parts: Sequence[bytes | Stretch]

    def size(self, part: bytes | Stretch) -> int:
        """Bytes."""
        return len(part) if isinstance(part, bytes) else part.count * self.source.specs[part.name].dtype.itemsize

    @property
    def nbytes(self) -> int:
        return sum(map(self.size, self.parts))

    def digest(self) -> str:
        """Of how it is laid out, not of what is in the tensors."""
        known = hashlib.sha256(self.path.encode())
        for part in self.parts:
            dtype = "" if isinstance(part, bytes) else self.source.specs[part.name].dtype
            known.update(repr((part, dtype)).encode())
        return known.hexdigest()


class Written(NamedTuple):
    bytes: int
    checksum: str


class Checksum(Protocol):
    """As of hashlib."""

    def update(self, data: memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


class CRC32:
    """Tells of what a crash does to a file, not of what somebody does, in a third of SHA-256's time."""

    def __init__(self) -> None:
        self.value = 0

    def update(self, data: memoryview, /) -> None:
        self.value = zlib.crc32(data, self.value)

    def hexdigest(self) -> str:
        return f"{self.value:08x}"


def write(
    folder: Path,
    files: Sequence[File],
    advance: Callable[[int], None],
    checksum: Callable[[], Checksum] = hashlib.sha256,
) -> dict[str, Written]:
    """Writes ``files`` to ``folder``, which may hold some of them from a write that was broken off.

    Args:
        folder: one that this process is :func:`alone` in.
        files: in this order.
        advance: told of the bytes that are written, or found written.
        checksum: of a file.

    Returns:
        By path, of every file.

    Raises:
        UserError: a tensor cannot be read, or the disk takes no more.
    """
    prints = [file.source.fingerprint() for file in files]
    plan = None if None in prints else [[file.digest(), known] for file, known in zip(files, prints, strict=True)]
    # Pages of their own: direct writes want whole ones.
    buffers = [torch.frombuffer(mmap.mmap(-1, PIECE), dtype=torch.uint8) for _ in range(PIECES)]
    done = _known(folder, plan)
    try:
        if not done:
            _empty(folder)
            _enter(folder, plan, done)  # before any file: by it the folder is known for one of ours
        for file in files:
            entry = done.get(file.path)
            if entry is not None and _measure(folder / file.path, checksum()) == entry:
                advance(entry.bytes)
                continue
            done.pop(file.path, None)
            done[file.path] = _write(folder / file.path, file, buffers, checksum(), advance)
            _enter(folder, plan, done)
    except OSError as error:
        what = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        fix = "make room or mend the disk, then give the same command again: it goes on from there"
        raise UserError(what, str(folder), fix) from None
    return done


def publish(folder: Path, final: Path) -> None:
    """Gives a folder that is whole and on the disk its name. The journal goes last: as long as the folder has the old
    name it is known for one that is written."""
    folder.rename(final)
    (final / JOURNAL).unlink()
    layout.sync(final)
    layout.sync(final.parent)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes ``folder`` if it is not there; while this lasts no other process is in it, under whatever name it has then.

    Raises:
        UserError: another process is in it, or was until now, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(str(error.strerror), str(folder), "name another directory") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(handle), folder.stat())  # the other one may have renamed it just now
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            raise UserError("another process writes there", str(folder), "wait for it")
        yield
    finally:
        os.close(handle)


def _known(folder: Path, plan: list | None) -> dict[str, Written]:
    """The files that the journal tells of, if it is of the same tensors and layout."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        journal = reading.json_object(reading.text(folder / JOURNAL, LARGEST_JOURNAL, follow=False))
        if plan is not None and journal["plan"] == plan:
            return {path: Written(*entry) for path, entry in journal["files"].items()}
    return {}


def _empty(folder: Path) -> None:
    """Takes everything but the journal out of a folder that has one.

    Raises:
        UserError: it has none, and something else.
    """
    found = [path for path in folder.iterdir() if path.name not in (JOURNAL, f"{JOURNAL}.tmp")]
    if found and not (folder / JOURNAL).is_file():
        what = f"it holds {found[0].name}, and no conversion wrote it"
        raise UserError(what, str(folder), "move it away, or name another directory")
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _enter(folder: Path, plan: list | None, files: dict[str, Written]) -> None:
    fresh = folder / f"{JOURNAL}.tmp"
    fresh.write_text(json.dumps({"plan": plan, "files": files}))
    layout.sync(fresh)
    fresh.replace(folder / JOURNAL)
    layout.sync(folder)


def _measure(path: Path, known: Checksum) -> Written | None:
    """What there is of a file."""
    size, piece = 0, memoryview(bytearray(BLOCK))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(piece):
                known.update(piece[:count])
                size += count
    except OSError:
        return None
    return Written(size, known.hexdigest())


def _write(
    path: Path, file: File, buffers: list[torch.Tensor], known: Checksum, advance: Callable[[int], None]
) -> Written:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, offset = path.with_name(f".{path.name}.tmp"), 0
    with _Pieces(file, buffers) as pieces, _opened(partial) as out:
        for piece in pieces.read():
            sectors = pieces.sectors(piece)
            for start, stop in _stretches(sectors):
                _put(out, sectors.data[start:stop], offset + start)
            pieces.hash(known.update, piece.data)
            offset += piece.size
            advance(piece.size)
        pieces.wait()
        os.ftruncate(out, offset)
        os.fsync(out)
    partial.replace(path)
    layout.sync(path.parent)
    return Written(offset, known.hexdigest())


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A new file, written past the page cache where the file system can: what is larger than memory would push all else
    out of it, and copying into it costs more than the rest of a conversion."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        handle = os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        handle = os.open(path, flags, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


def _put(handle: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(handle, data, offset)
        data, offset = data[count:], offset + count


def _stretches(piece: np.ndarray) -> list[tuple[int, int]]:
    """Where blocks of ``piece`` (uint8) lie that are not zeros, neighbours together."""
    found: list[tuple[int, int]] = []
    for start in range(0, piece.size, BLOCK):
        block = piece[start : start + BLOCK]
        if not (block[::4096].any() or block.any()):  # a sample is enough for nearly every block
            continue
        begin = found.pop()[0] if found and found[-1][1] == start else start
        found.append((begin, start + block.size))
    return found


class _Pieces:
    """A file's bytes in pieces, each read while those before it are written and hashed."""

    def __init__(self, file: File, buffers: list[torch.Tensor]) -> None:
        self.file, self.buffers = file, buffers
        self.reader, self.hasher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.hashed: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self.reader, self.hasher):
            pool.shutdown(cancel_futures=True)

    def read(self) -> Iterator[np.ndarray]:
        """uint8; a piece is there until PIECES - 2 more were given."""
        ahead: deque[Future[np.ndarray]] = deque()
        for index, parts in enumerate(_pieces(self.file)):
            if index >= PIECES:
                self.hashed.popleft().result()  # of the piece that this buffer held
            ahead.append(self.reader.submit(self._fill, self.buffers[index % PIECES], parts))
            if len(ahead) == PIECES - 1:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def sectors(self, piece: np.ndarray) -> np.ndarray:
        """``piece`` with zeros behind it up to a whole sector."""
        (buffer,) = (b for b in self.buffers if b.data_ptr() == piece.ctypes.data)
        whole = buffer[: -(-piece.size // SECTOR) * SECTOR].numpy()
        whole[piece.size :] = 0
        return whole

    def hash(self, update: Callable[[memoryview], None], piece: memoryview) -> None:
        self.hashed.append(self.hasher.submit(update, piece))

    def wait(self) -> None:
        for update in self.hashed:
            update.result()

    def _fill(self, buffer: torch.Tensor, parts: list[bytes | Stretch]) -> np.ndarray:
        place = 0
        for part in parts:
            size = self.file.size(part)
            into = buffer[place : place + size]
            if isinstance(part, bytes):
                memory(into)[:] = part
            else:
                self.file.source.read(part.name, part.start, into.view(self.file.source.specs[part.name].dtype))
            place += size
        return buffer[:place].numpy()


def _pieces(file: File) -> Iterator[list[bytes | Stretch]]:
    """The parts of ``file``, cut where a piece is full. Elements are aligned in a file: none is cut."""
    parts: list[bytes | Stretch] = []
    filled = 0
    for part in file.parts:
        width = 1 if isinstance(part, bytes) else file.source.specs[part.name].dtype.itemsize
        count, start = file.size(part) // width, 0
        while start < count:
            taken = min((PIECE - filled) // width, count - start)
            if isinstance(part, bytes):
                parts.append(part[start : start + taken])
            else:
                parts.append(Stretch(part.name, part.start + start, taken))
            filled, start = filled + taken * width, start + taken
            if filled == PIECE:
                yield parts
                parts, filled = [], 0
    if parts:
        yield parts
