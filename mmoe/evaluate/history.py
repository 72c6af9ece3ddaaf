"""What a run directory says about its run, read for the report."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmoe.errors import UserError
from mmoe.evaluate.goodput import Goodput, account
from mmoe.recipe import Recipe, load_recipe
from mmoe.recipe.model import MoE

TOLD = {"shown": "", "blank": "blank images", "none": "no images"}
"""What a model saw of an evaluation's pictures, in words."""


@dataclass(frozen=True, kw_only=True)
class History:
    """A run: its recipe, a row per step, and the evaluations that lie in ``DIR/evaluation``."""

    recipe: Recipe
    rows: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    skipped: list[str]
    """The bad samples that training met, named with the reason."""
    evaluations: dict[str, dict[str, Any]]
    """By file name without suffix: what `mmoe evaluate --json` wrote of the suites that ask questions."""
    losses: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The same of the suite ``loss``."""
    goodput: Goodput | None = None
    """None for a run without events.jsonl."""
    stages: tuple[tuple[int, str], ...] = ()
    """Of a run of several stages: the rows before each, and its name."""

    def column(self, name: str) -> NDArray[np.float64]:
        """``[steps]``; NaN where a step has no such number."""
        return np.array([np.nan if row.get(name) is None else row[name] for row in self.rows], np.float64)

    @property
    def steps(self) -> NDArray[np.float64]:
        return self.column("step")

    def parts(self) -> list[slice]:
        """The rows of each stage; all of them, where there is one."""
        begins = [first for first, _ in self.stages] or [0]
        return [slice(*ends) for ends in zip(begins, [*begins[1:], len(self.rows)], strict=True)]

    def loads(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Steps ``[t]`` at which the expert load was written, and the loads ``[t, layers, N + Z]``."""
        rows = [row for row in self.rows if "expert_load" in row]
        moe, layers = self.moe, self.recipe.model.backbone.layers
        shape = (len(rows), layers, moe.experts + moe.zero_experts)
        steps = np.array([row["step"] for row in rows], np.float64)
        return steps, np.array([row["expert_load"] for row in rows], np.float64).reshape(shape)

    @property
    def moe(self) -> MoE:
        """The table of the experts, in the recipe of a model that has any."""
        assert self.recipe.model.moe is not None
        return self.recipe.model.moe

    def vision(self) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
        """Evaluations of one model on the same questions with pictures and without any: the former's name, and both."""
        shown = {name: result for name, result in self.evaluations.items() if seen(result) == "shown"}
        none = [result for result in self.evaluations.values() if seen(result) == "none"]
        asked = ("suite", "checkpoint", "data", "samples", "system_prompt")
        return [
            (name, on, off)
            for name, on in shown.items()
            for off in none
            if all(on.get(key) == off.get(key) for key in asked)
        ]

    def settled_active_experts(self) -> float:
        """Mean active experts per token over the last fifth of the steps; NaN without steps."""
        values = self.column("active_experts_mean")
        tail = values[len(values) - max(1, len(values) // 5) :]
        return float(np.nanmean(tail)) if np.isfinite(tail).any() else float("nan")


def seen(result: dict[str, Any]) -> str:
    """What the model saw of an evaluation's pictures: ``shown``, ``blank`` or ``none``."""
    return result.get("images", "blank" if result["blank"] else "shown")


def read(run: Path) -> History:
    """Read a run directory.

    Raises:
        UserError: it is no run directory, or a file in it cannot be understood.
    """
    for name in ("recipe.toml", "metrics.jsonl"):
        if not (run / name).is_file():
            raise UserError(f"no {name} in the run directory", str(run), "give the --out of a `mmoe train`")
    recipe = load_recipe(run / "recipe.toml")
    rows = _lines(run / "metrics.jsonl")
    if not rows:
        raise UserError("no step has been taken yet", str(run / "metrics.jsonl"), "train first")
    results = read_results(run / "evaluation")
    path = run / "skipped.jsonl"
    skipped = [f"step {line['step']}: {line['sample']}" for line in _lines(path)] if path.is_file() else []
    journal = run / "events.jsonl"
    events = [event for event in map(_event, journal.read_text().splitlines()) if event] if journal.is_file() else []
    try:
        goodput = account(events, rows, (run / "metrics.jsonl").stat().st_mtime)
    except (KeyError, TypeError) as error:
        raise UserError(f"not what training writes: {error}", str(journal), "remove the line") from None
    evaluations, losses = (
        {name: result for name, result in results.items() if (result.get("suite") == "loss") is wanted}
        for wanted in (False, True)
    )
    return History(recipe=recipe, rows=rows, skipped=skipped, evaluations=evaluations, losses=losses, goodput=goodput)


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """What `mmoe evaluate --json` wrote into a folder, by file name without suffix.

    Raises:
        UserError: a file is no JSON.
    """
    results = {}
    for path in sorted(folder.glob("*.json")):
        try:
            results[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError("not a JSON file", str(path), "evaluate again") from None
    return results


def _event(line: str) -> dict[str, Any] | None:
    """None for what a full disk or a lost host left of a line."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise UserError("not a JSON line", f"{path}:{number}", "remove the line") from None
    return rows
