"""Writes a checkpoint: under a temporary name, checked and flushed, then renamed."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
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


@calls.phase("saving a checkpoint")
def save(
    run: Path, step: int, models: Sequence[Any], optimizer: Any, progress: dict, recipe: Recipe, tokenizer: Path
) -> Path:
    """Saves from all ranks together; returns the checkpoint's folder once it is whole on disk. Then those go that the
    recipe does not keep.

    ``progress`` is what :func:`mmoe.checkpoint.load.resume` gives back, JSON only.

    Raises:
        UserError: on all ranks: it could not be written. What was there before is untouched.
    """
    final = layout.folder(run, step)
    partial = final.with_name(f".{final.name}.tmp")
    here = engine.ranks()

    def begin() -> None:
        for leftover in final.parent.glob(".step_*.tmp"):
            shutil.rmtree(leftover)
        (partial / "state").mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"it takes {needed / 1e9:.3f} GB, the disk has {free / 1e9:.3f} GB")

    def finish() -> None:
        layout.write_manifest(partial, {name: entry for part in parts for name, entry in part.items()})
        for folder in (partial / "state", partial):
            layout.sync(folder)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        layout.point_to(final)

    def describe() -> None:
        (partial / "progress.json").write_text(json.dumps(progress, indent=1) + "\n")
        (partial / "recipe.toml").write_text(dump_recipe(recipe))
        shutil.copyfile(tokenizer, partial / "tokenizer.json")

    try:
        content = state.sharded(models, optimizer)
        needed = sum(engine.gather(state.size(content)))
        _everywhere(begin, here.first)
        state.save(partial / "state", content)
        _everywhere(describe, here.first)
        parts = [part or {} for part in _everywhere(lambda: layout.entries(partial, here.rank, here.world))]
        _everywhere(finish, here.first)
    except (_NotWrittenError, CheckpointException) as error:
        free = shutil.disk_usage(run).free
        if here.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise _explain(error, free, run, final) from None
    if here.first:
        _delete(layout.outdated(run, recipe.checkpoint.keep_last, recipe.checkpoint.keep_every))
    return final


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


def _explain(error: BaseException, free: int, run: Path, final: Path) -> UserError:
    reason = str(error)
    if isinstance(error, CheckpointException):
        # Only the rank that put the writes together is told whose failed.
        failures = [f"rank {rank}: {str(failure).splitlines()[0]}" for rank, (failure, _) in error.failures.items()]
        reason = f"{(failures or ['another rank failed'])[0]} (the disk has {free / 1e9:.3f} GB left)"
    before = layout.newest(run)
    whole = f"{before.name} is whole: go on from it with --resume" if before else "no checkpoint was written before it"
    what = f"the checkpoint of step {int(final.name.removeprefix('step_'))} was not written: {reason}"
    return UserError(what, str(run), f"make room or mend the disk; {whole}")


def _delete(checkpoints: Sequence[Path]) -> None:
    """Under another name first, so that one half deleted is never taken for a whole one."""
    for checkpoint in checkpoints:
        gone = checkpoint.with_name(f".{checkpoint.name}.tmp")
        os.replace(checkpoint, gone)
        shutil.rmtree(gone, ignore_errors=True)
