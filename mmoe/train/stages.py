"""A recipe's stages one after another: each is a run of its own, from the weights of the one before."""

import gc
from pathlib import Path

from mmoe.checkpoint import layout as files
from mmoe.ending import say
from mmoe.errors import UserError
from mmoe.parallel import engine
from mmoe.recipe.load import dump_recipe
from mmoe.recipe.schema import Recipe
from mmoe.train import run


def folder(recipe: Recipe, number: int, out: Path) -> Path:
    """DIR/1-align, DIR/2-instruct, …: the run directory of a stage, counted from 0."""
    return out / f"{number + 1}-{name(recipe, number)}"


def name(recipe: Recipe, number: int) -> str:
    """Of a stage, as the recipe's file calls it."""
    return recipe.stages[number].name.removeprefix(f"{recipe.name}-")


def one(recipe: Recipe, called: str | None) -> Recipe:
    """The stage that is ``called`` so; the recipe itself where it has none.

    Raises:
        UserError: there is no such stage, or none is named where there are several.
    """
    names = [name(recipe, number) for number in range(len(recipe.stages))]
    if called is None and not names:
        return recipe
    if called not in names:
        what = "the recipe has stages: one is needed" if called is None else f"no stage is called {called!r}"
        fix = f"the stages are {', '.join(names)}" if names else "the recipe has no stages: leave it out"
        raise UserError(what, "--stage", fix)
    return recipe.stages[names.index(called)]


def train(
    recipe: Recipe, out: Path, resume: bool = False, first: str | None = None, initial: Path | None = None
) -> None:
    """Trains ``recipe`` into ``out``, stage by stage where it has any, on all ranks of the launch.

    Args:
        resume: goes on with the first stage that is not complete, from its newest checkpoint or from its beginning.
        first: the stage to begin with; without ``initial`` the one before it has to be complete.
        initial: a checkpoint, whose weights the first of the stages that are trained begins with.

    Raises:
        UserError: there is no such stage, the one before is not complete; and see :func:`mmoe.train.run.train`.
        Interrupted, RankLost: see there.
    """
    if not recipe.stages:
        if first is not None:
            raise UserError(f"no stage is called {first!r}", "--stage", "the recipe has no stages: leave it out")
        run.train(recipe, out, resume, initial)
        return
    rank, _ = engine.announced()
    if rank == 0 and not (out / "recipe.toml").exists():
        out.mkdir(parents=True, exist_ok=True)
        (out / "recipe.toml").write_text(dump_recipe(recipe))
    wanted = _wanted(recipe, first)
    done = (number for number in range(wanted, len(recipe.stages)) if _complete(recipe, number, out) is None)
    begin = next(done, len(recipe.stages) - 1) if resume else wanted
    for number in range(begin, len(recipe.stages)):
        before = _complete(recipe, number - 1, out) if number else None
        if number == wanted and initial is not None:
            before = initial
        if number and before is None:
            what = f"stage {name(recipe, number - 1)!r} is not complete in {folder(recipe, number - 1, out)}"
            raise UserError(what, f"--stage {name(recipe, number)}", "train it first, or give its weights with --from")
        if rank == 0:
            say(f"stage {number + 1} of {len(recipe.stages)}: {name(recipe, number)}")
        here = folder(recipe, number, out)
        run.train(recipe.stages[number], here, resume and files.newest(here) is not None, before)
        gc.collect()  # models and optimizers in cycles


def _wanted(recipe: Recipe, first: str | None) -> int:
    """The number of the stage called ``first``, else of the first one."""
    names = [name(recipe, number) for number in range(len(recipe.stages))]
    if first is not None and first not in names:
        raise UserError(f"no stage is called {first!r}", "--stage", f"the stages are {', '.join(names)}")
    return names.index(first) if first else 0


def _complete(recipe: Recipe, number: int, out: Path) -> Path | None:
    """The last checkpoint of a stage, if it has come to its end."""
    newest = files.newest(folder(recipe, number, out))
    return newest if newest is not None and newest.name == f"step_{recipe.stages[number].train.steps:08d}" else None
