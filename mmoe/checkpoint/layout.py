"""Where a checkpoint's files lie, and how one knows that they are whole.

DIR/checkpoints/latest                      the name of the newest whole checkpoint
DIR/checkpoints/step_00000100/state/        Megatron's torch_dist: weights, controller, optimizer, random states
                             /progress.json step, position in the data stream, counters
                             /recipe.toml, tokenizer.json
                             /manifest.json size and SHA-256 of every other file
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from mmoe import reading
from mmoe.errors import UserError

MANIFEST = "manifest.json"
LARGEST_MANIFEST = 1 << 26
"""Bytes."""
PIECE = 1 << 22
"""Bytes that are hashed at a time."""


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def _digest(path: Path, ended: threading.Event | None = None) -> str:
    """SHA-256 of a file, or of its beginning where ``ended`` is set meanwhile."""
    known, piece = hashlib.sha256(), memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as file:
        while (count := file.readinto(piece)) and not (ended and ended.is_set()):
            known.update(piece[:count])
    return known.hexdigest()


def sync(path: Path) -> None:
    """Forces a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def entries(checkpoint: Path, files: Iterable[Path]) -> dict[str, dict]:
    """What the manifest says of ``files``; they are forced to the disk."""
    found = {}
    for path in files:
        sync(path)
        found[str(path.relative_to(checkpoint))] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    return found


def write_manifest(checkpoint: Path, known: dict[str, dict], without: Collection[str] = ()) -> None:
    """``known``: the :func:`entries` that there are already; those of the other files are added, but for files called
    as one of ``without``."""
    files = (path for path in checkpoint.rglob("*") if path.is_file() and path.name not in (MANIFEST, *without))
    others = (path for path in files if str(path.relative_to(checkpoint)) not in known)
    content = dict(sorted({**known, **entries(checkpoint, others)}.items()))
    (checkpoint / MANIFEST).write_text(json.dumps({"format": 1, "files": content}, indent=1) + "\n")
    sync(checkpoint / MANIFEST)


def manifest(checkpoint: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of every file.

    Raises:
        UserError: there is no checkpoint, or its manifest cannot be read.
    """
    if not checkpoint.is_dir():
        raise UserError("no checkpoint", str(checkpoint), "name a folder like DIR/checkpoints/step_00000100")
    try:
        files = reading.json_object(reading.text(checkpoint / MANIFEST, LARGEST_MANIFEST, follow=False))["files"]
        return {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        raise UserError(f"checkpoint without {MANIFEST}", str(checkpoint), _mend(checkpoint)) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"unreadable {MANIFEST}", str(checkpoint), _mend(checkpoint)) from None


def _mend(checkpoint: Path) -> str:
    older = max((path for path in checkpoint.parent.glob("step_*") if path < checkpoint), default=None)
    instead = f"move this folder away to go on from {older.name}" if older else "there is no older checkpoint here"
    return f"restore the file, or {instead}"


class Unreadable(UserError):
    """A file with tensors is damaged, as far as reading tells."""


@contextmanager
def verified(checkpoint: Path) -> Iterator[None]:
    """While it lasts the files with tensors are held against their checksums, beside what is done with them: that
    counts only if this ends without an error, and where it fails because a file was altered (:class:`Unreadable`),
    this says so. Any other failure waits for no checksum.

    Raises:
        UserError: see :func:`verify`.
    """
    ended = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        check = pool.submit(verify, checkpoint, only=is_tensors, ended=ended)
        try:
            yield
        except Unreadable:
            check.result()
            raise
        except BaseException:
            ended.set()
            raise
        check.result()


def is_tensors(name: str) -> bool:
    """Whether a file is one of the large ones."""
    return name.endswith(".distcp")


def verify(
    checkpoint: Path,
    rank: int = 0,
    ranks: int = 1,
    only: Callable[[str], bool] = lambda name: True,
    ended: threading.Event | None = None,
) -> int:
    """How many files ``checkpoint`` has; raises :class:`UserError` unless each is there and unaltered, and names an
    older checkpoint. One of several ``ranks`` looks at its part of the files, or of those for which ``only`` holds."""
    entries = [(name, *entry) for name, entry in manifest(checkpoint).items() if only(name)]
    for name, size, digest in entries[rank::ranks]:
        path, fix = checkpoint / name, _mend(checkpoint)
        if not path.resolve().is_relative_to(checkpoint.resolve()):
            raise UserError(f"{MANIFEST} names {name!r}, which is not in the checkpoint", str(checkpoint), fix)
        if not path.is_file():
            raise UserError(f"checkpoint lacks {name}", str(checkpoint), fix)
        if path.stat().st_size != size or _digest(path, ended) != digest:
            raise UserError(f"{name} was altered since it was saved", str(checkpoint), fix)
    return len(entries)


def newest(run: Path) -> Path | None:
    """The newest checkpoint of a run, or None: the one that ``latest`` names, or the last of all if that is gone.

    A half-written one has another name and is never returned.
    """
    folders = run / "checkpoints"
    pointer = folders / "latest"
    name = pointer.read_text().strip() if pointer.is_file() else ""
    if re.fullmatch(r"step_\d+", name) and (folders / name).is_dir():
        return folders / name
    return max((path for path in folders.glob("step_*") if path.is_dir()), default=None)


def outdated(run: Path, keep_last: int, keep_every: int) -> list[Path]:
    """The checkpoints to delete: all but the newest ``keep_last``, those at multiples of ``keep_every`` steps and the
    one that ``latest`` names (later steps may lie there that the run went back behind); none where ``keep_last`` is 0.
    """
    steps = {path: int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*")}
    old = sorted(steps, key=lambda path: steps[path])[:-keep_last] if keep_last else []
    return [path for path in old if path != newest(run) and (not keep_every or steps[path] % keep_every)]


def point_to(checkpoint: Path) -> None:
    """Makes ``latest`` name ``checkpoint``, in one step that a crash cannot split."""
    pointer = checkpoint.parent / "latest"
    fresh = checkpoint.parent / ".latest.tmp"
    fresh.write_text(checkpoint.name + "\n")
    sync(fresh)
    fresh.replace(pointer)
    sync(checkpoint.parent)
