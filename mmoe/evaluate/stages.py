"""A run of several stages, read for its report: each stage's history, and all of them as one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmoe.checkpoint.load import blank
from mmoe.errors import UserError
from mmoe.evaluate.goodput import Goodput
from mmoe.evaluate.history import History, read, read_results, seen
from mmoe.evaluate.loss import FIRST
from mmoe.recipe import Recipe, load_recipe
from mmoe.train import stages
from mmoe.train.step import freeze


@dataclass(frozen=True, kw_only=True)
class Start:
    """Held-out loss at the beginning of a stage."""

    loss: float
    measured: bool
    """False where it is that of the stage before, whose model this one has, too: its weights are handed over."""
    ended: float | None
    """That at the end of the stage before."""
    first: bool
    """Of first weights, not of any that were handed over."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage that was begun."""

    name: str
    recipe: Recipe
    history: History
    begin: dict[str, dict[str, Any]]
    """``DIR/N-NAME/evaluation/begin``, by file name without suffix: losses of what the stage begins with."""
    trained: int
    """Parameters that are trained."""
    parameters: int
    before: "Stage | None"
    """The stage before it, where that belongs to the run."""

    def losses(self) -> dict[str, float]:
        """Held-out loss at its end, by evaluation, of those that show pictures."""
        return {name: result["loss"] for name, result in self.history.losses.items() if seen(result) == "shown"}

    def start(self, name: str) -> Start | None:
        """The loss of the evaluation ``name`` at its beginning; None where nothing says it."""
        ended = self.before.losses().get(name) if self.before else None
        if name in self.begin:
            result = self.begin[name]
            return Start(loss=result["loss"], measured=True, ended=ended, first=result["checkpoint"] == FIRST)
        if ended is not None and self.before and _same_answers(self.before.recipe, self.recipe):
            return Start(loss=ended, measured=False, ended=ended, first=False)
        return None


def _same_answers(before: Recipe, after: Recipe) -> bool:
    """Whether weights that are handed over compute what they did: nothing of the model differs, nor what it sees."""
    return before.model == after.model and before.precision == after.precision and _view(before) == _view(after)


def _view(recipe: Recipe) -> tuple[str, str]:
    """How an image becomes a square."""
    return recipe.data.fit, recipe.data.interpolation


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A run of a recipe with stages."""

    recipe: Recipe
    stages: list[Stage]
    """Those that were begun."""
    history: History
    """All of their steps, counted through."""

    def losses(self) -> list[str]:
        """The evaluations of held-out loss, in the order of their names."""
        return sorted({name for stage in self.stages for name in (*stage.losses(), *stage.begin)})

    def evaluations(self) -> list[str]:
        """The evaluations that ask questions: those that show pictures first, `test` before the others."""
        every = {name: result for stage in self.stages for name, result in stage.history.evaluations.items()}
        return sorted(every, key=lambda name: (seen(every[name]) != "shown", name != "test", name))

    def goodput(self) -> Goodput | None:
        """Of all stages together, of each from its own first start to its end; None where one has no events."""
        parts = [stage.history.goodput for stage in self.stages]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        totals = {name: sum(getattr(part, name) for part in known) for name in ("wall", "steps", "lost", "checkpoints")}
        return Goodput(**totals, starts=[start for part in known for start in part.starts])


def read_whole(run: Path) -> Whole:
    """Read the run directory of a recipe with stages.

    Raises:
        UserError: no stage has taken a step yet, or a file cannot be understood.
    """
    recipe = load_recipe(run / "recipe.toml")
    found: list[Stage] = []
    for number in range(len(recipe.stages)):
        folder = stages.folder(recipe, number, run)
        metrics = folder / "metrics.jsonl"
        if not metrics.is_file() or not metrics.stat().st_size:
            continue
        history = read(folder)
        trained, parameters = _parameters(history.recipe)
        stage = Stage(
            name=stages.name(recipe, number),
            recipe=history.recipe,
            history=history,
            begin=read_results(folder / "evaluation" / "begin"),
            trained=trained,
            parameters=parameters,
            before=found[-1] if found else None,
        )
        found.append(stage)
    if not found:
        raise UserError("no step has been taken yet", str(run), "train first")
    return Whole(recipe=recipe, stages=found, history=_joined(recipe, found))


def _parameters(recipe: Recipe) -> tuple[int, int]:
    """How many a stage trains, and how many the model has."""
    model = blank(recipe)
    freeze([model], recipe.train.frozen)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _joined(recipe: Recipe, found: Sequence[Stage]) -> History:
    rows: list[dict[str, Any]] = []
    begins: list[tuple[int, str]] = []
    skipped: list[str] = []
    for stage in found:
        before = rows[-1]["step"] if rows else 0
        begins.append((len(rows), stage.name))
        rows += [row | {"step": before + row["step"]} for row in stage.history.rows]
        skipped += [f"{stage.name}, {reason}" for reason in stage.history.skipped]
    # What the stages share of a model (experts, layers) is the same in all of them: weights are handed over.
    whole = replace(found[-1].recipe, name=recipe.name, description=recipe.description)
    return History(recipe=whole, rows=rows, skipped=skipped, evaluations={}, stages=tuple(begins))
