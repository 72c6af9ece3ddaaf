"""Writes a checkpoint: under a temporary name, checked and flushed, then renamed."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmoe.checkpoint import layout
from mmoe.parallel import calls, engine, state
from mmoe.recipe.load import dump_recipe
from mmoe.recipe.schema import Recipe


@calls.phase("saving a checkpoint")
def save(
    run: Path, step: int, models: Sequence[Any], optimizer: Any, progress: dict, recipe: Recipe, tokenizer: Path
) -> Path:
    """Saves from all ranks together; returns the checkpoint's folder once it is whole on disk.

    ``progress`` is what :func:`mmoe.checkpoint.load.resume` gives back, JSON only.
    """
    final = layout.folder(run, step)
    partial = final.with_name(f".{final.name}.tmp")
    first = engine.ranks().first
    if first:
        for leftover in final.parent.glob(".step_*.tmp"):
            shutil.rmtree(leftover)
        (partial / "state").mkdir(parents=True)
    engine.barrier()
    state.save(partial / "state", models, optimizer)
    engine.barrier()
    if first:
        (partial / "progress.json").write_text(json.dumps(progress, indent=1) + "\n")
        (partial / "recipe.toml").write_text(dump_recipe(recipe))
        shutil.copyfile(tokenizer, partial / "tokenizer.json")
        layout.write_manifest(partial)
        for folder in (partial / "state", partial):
            layout.sync(folder)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        layout.point_to(final)
    engine.barrier()
    return final
