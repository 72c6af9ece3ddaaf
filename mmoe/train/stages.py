"""A recipe's stages one after another: each is a run of its own, from the weights of the one before."""

import gc
from pathlib import Path

from mmoe.checkpoint import layout as files
from mmoe.ending import say
from mmoe.errors import Interrupted, UserError
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
    wanted = _wanted(recipe, first)
    begin = resumed(recipe, out, wanted, first is not None) if resume else wanted
    if rank == 0:
        for number, stage in enumerate(recipe.stages):
            # Refused before anything is trained: a stage that is another recipe's, or would be trained over.
            run.starting_point(stage, folder(recipe, number, out), resume or number < wanted)
        out.mkdir(parents=True, exist_ok=True)
        (out / "recipe.toml").write_text(dump_recipe(recipe))
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
        stopped = run.train(recipe.stages[number], here, resume and files.newest(here) is not None, before)
        if stopped and number + 1 < len(recipe.stages):
            raise Interrupted(f"stopped after stage {name(recipe, number)!r}, saved; go on with --resume")
        gc.collect()  # models and optimizers in cycles


def resumed(recipe: Recipe, out: Path, wanted: int, named: bool) -> int:
    """The stage to go on with: the last that was begun, unless it is complete; none before ``wanted``, the one that the
    run begins with (a run that began with a later stage is resumed without its name, too, where none is ``named``)."""
    stages = range(wanted, len(recipe.stages))
    begun = [number for number in stages if files.newest(folder(recipe, number, out)) is not None]
    last = begun[-1] if begun and not named else None
    if last is None:
        return next((number for number in stages if _complete(recipe, number, out) is None), stages[-1])
    return min(last + (_complete(recipe, last, out) is not None), stages[-1])


def _wanted(recipe: Recipe, first: str | None) -> int:
    """The number of the stage called ``first``, else of the first one."""
    names = [name(recipe, number) for number in range(len(recipe.stages))]
    if first is not None and first not in names:
        raise UserError(f"no stage is called {first!r}", "--stage", f"the stages are {', '.join(names)}")
    return names.index(first) if first else 0


def final(recipe: Recipe, out: Path) -> Path | None:
    """The last checkpoint of a run, of its last stage where it has any, if it has come to its end."""
    if recipe.stages:
        return _complete(recipe, len(recipe.stages) - 1, out)
    newest = files.newest(out)
    return newest if newest == files.folder(out, recipe.train.steps) else None


def _complete(recipe: Recipe, number: int, out: Path) -> Path | None:
    """The last checkpoint of a stage, if it has come to its end."""
    return final(recipe.stages[number], folder(recipe, number, out))
