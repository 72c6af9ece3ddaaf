"""Writes checkpoints beside the training: under a temporary name, checked and flushed, then renamed."""

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed.checkpoint.api import CheckpointException

from mmoe.checkpoint import layout
from mmoe.errors import UserError
from mmoe.parallel import calls, engine, state
from mmoe.recipe.load import dump_recipe
from mmoe.recipe.schema import Recipe

Result = TypeVar("Result")


class _NotWrittenError(Exception):
    """Why, on all ranks alike."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is whole on disk."""

    path: Path
    step: int
    bytes: int
    """Of all ranks' tensors."""
    stall: float
    """Seconds that the training stood still for it, on this rank."""
    seconds: float
    """From the start of the save until it was whole."""


class _Pending:
    """A checkpoint under way: this rank's files are written, and their checksums made, by a thread."""

    def __init__(self, step: int, partial: Path, write: state.Write, size: int, begin: float) -> None:
        self.step, self.partial, self.write, self.size, self.begin = step, partial, write, size, begin
        self.stall = 0.0
        self.entries: dict[str, dict] = {}
        self.problem: Exception | None = None
        self.thread = threading.Thread(target=self._run, name=f"checkpoint {step}", daemon=True)

    def _run(self) -> None:
        try:
            self.write.run()
            self.entries = layout.entries(self.partial, (path for path in self.write.files if path.exists()))
        except Exception as error:
            self.problem = error


class Saver:
    """Saves a run's checkpoints, one at a time. Every method is called by all ranks together.

    The training stands still while the state is copied (:meth:`start`) and while the files of all ranks, written by
    then, become a checkpoint (:meth:`finish`); with ``checkpoint.asynchronous = false`` until the whole is on disk.

    Raises UserError from every method where a checkpoint could not be written: on all ranks, or on the one that could
    not, after which the others end. What was there before is untouched.
    """

    def __init__(self, run: Path, recipe: Recipe, tokenizer: Path) -> None:
        self.run, self.recipe, self.tokenizer = run, recipe, tokenizer
        self.pending: _Pending | None = None

    @calls.phase("saving a checkpoint")
    def start(self, step: int, models: Sequence[Any], optimizer: Any, progress: dict) -> list[Saved]:
        """Begins the checkpoint of ``step``; returns those that this call has brought to their end.

        ``progress`` is what :func:`mmoe.checkpoint.load.resume` gives back, JSON only.
        """
        before = self.finish()
        begin = time.perf_counter()
        final = layout.folder(self.run, step)
        # A name of this attempt's own: a rank that an attempt before left behind may still write.
        partial = final.with_name(f".{final.name}.{engine.from_first(os.urandom(4).hex())}.tmp")
        first = engine.ranks().first

        def prepare() -> None:
            for leftover in final.parent.glob(".step_*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)
            (partial / "state").mkdir(parents=True)
            free = shutil.disk_usage(partial).free
            if free < size:
                raise OSError(errno.ENOSPC, f"it takes {size / 1e9:.3f} GB, the disk has {free / 1e9:.3f} GB")
            (partial / "progress.json").write_text(json.dumps(progress, indent=1) + "\n")
            (partial / "recipe.toml").write_text(dump_recipe(self.recipe))
            shutil.copyfile(self.tokenizer, partial / "tokenizer.json")

        try:
            content = state.sharded(models, optimizer)
            size = sum(engine.gather(state.size(content)))
            _everywhere(prepare, first)
            self.pending = _Pending(step, partial, state.Write(partial / "state", content), size, begin)
        except (_NotWrittenError, CheckpointException, OSError) as error:
            raise self._explain(error, final, partial) from None
        except RuntimeError as error:
            if "PytorchStreamWriter" not in str(error):
                raise
            raise self._explain(error, final, partial) from None  # common.pt on a disk that takes no more
        self.pending.thread.start()
        self.pending.stall = time.perf_counter() - begin
        return before if self.recipe.checkpoint.asynchronous else before + self.finish()

    def poll(self) -> list[Saved]:
        """Ends the checkpoint under way if every rank has written its part; asked once a step."""
        if self.pending is None:
            return []
        begin = time.perf_counter()
        everyone = engine.all_true(not self.pending.thread.is_alive())
        self.pending.stall += time.perf_counter() - begin
        return self.finish() if everyone else []

    @calls.phase("saving a checkpoint")
    def finish(self) -> list[Saved]:
        """Waits for the checkpoint under way and makes it the newest; then those go that the recipe does not keep."""
        if self.pending is None:
            return []
        pending, self.pending = self.pending, None
        begin = time.perf_counter()
        pending.thread.join()
        final, here = layout.folder(self.run, pending.step), engine.ranks()

        def hashed() -> dict[str, dict]:
            if pending.problem is not None:
                raise pending.problem
            return pending.entries

        def publish() -> None:
            layout.write_manifest(pending.partial, {name: entry for part in parts for name, entry in part.items()})
            for folder in (pending.partial / "state", pending.partial):
                layout.sync(folder)
            shutil.rmtree(final, ignore_errors=True)
            pending.partial.rename(final)
            layout.point_to(final)

        try:
            parts = [part or {} for part in _everywhere(hashed)]
            pending.write.finish()
            _everywhere(publish, here.first)
        except (_NotWrittenError, CheckpointException, OSError) as error:
            raise self._explain(error, final, pending.partial) from None
        if here.first:
            keep = self.recipe.checkpoint
            _delete(layout.outdated(self.run, keep.keep_last, keep.keep_every))
        now = time.perf_counter()
        return [Saved(final, pending.step, pending.size, pending.stall + now - begin, now - pending.begin)]

    def _explain(self, error: BaseException, final: Path, partial: Path) -> UserError:
        free = shutil.disk_usage(self.run).free
        if engine.ranks().first:
            shutil.rmtree(partial, ignore_errors=True)
        reason = str(error)
        if isinstance(error, CheckpointException):
            # Only the rank that put the writes together is told whose failed.
            failures = [f"rank {rank}: {str(failure).splitlines()[0]}" for rank, (failure, _) in error.failures.items()]
            reason = f"{(failures or ['another rank failed'])[0]} (the disk has {free / 1e9:.3f} GB left)"
        before = layout.newest(self.run)
        whole = (
            f"{before.name} is whole: go on from it with --resume" if before else "no checkpoint was written before it"
        )
        what = f"the checkpoint of step {int(final.name.removeprefix('step_'))} was not written: {reason}"
        return UserError(what, str(self.run), f"make room or mend the disk; {whole}")


def save(
    run: Path, step: int, models: Sequence[Any], optimizer: Any, progress: dict, recipe: Recipe, tokenizer: Path
) -> Path:
    """One checkpoint by all ranks together, whole on disk when this returns its folder."""
    saver = Saver(run, recipe, tokenizer)
    saved = saver.start(step, models, optimizer, progress) + saver.finish()
    return saved[-1].path


def _everywhere(action: Callable[[], Result], runs: bool = True) -> list[Result | None]:
    """What ``action`` returned on each rank, None where ``runs`` is False; goes on once all are done.

    Raises:
        _NotWrittenError: it was an OSError on one of them.
    """
    result, problem = None, None
    if runs:
        try:
            result = action()
        except OSError as error:
            problem = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    everyone = engine.gather((result, problem))
    for rank, (_, problem) in enumerate(everyone):
        if problem:
            raise _NotWrittenError(f"rank {rank}: {problem}")
    return [result for result, _ in everyone]


def _delete(checkpoints: Sequence[Path]) -> None:
    """Under another name first, so that one half deleted is never taken for a whole one. What cannot be deleted stays:
    the checkpoint that made room for itself is whole."""
    for checkpoint in checkpoints:
        gone = checkpoint.with_name(f".{checkpoint.name}.tmp")
        with suppress(OSError):
            os.replace(checkpoint, gone)
            shutil.rmtree(gone)
