"""What a sweep over encoder sets found: a row a set, as JSON, as a page and as a picture."""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from mmoe.evaluate import runs
from mmoe.evaluate.figures import BLUE, INK, STYLE
from mmoe.models.count import count
from mmoe.recipe.schema import Recipe

Row = dict[str, Any]
"""``set``, ``encoders``, and either ``failed``, why, or the fields that :func:`row` gives."""


def row(name: str, recipe: Recipe, run: Path, answers: Mapping[str, Path]) -> Row:
    """A set whose run is done.

    Args:
        recipe: what was trained last, in the run directory ``run``.
        answers: the JSON file of an evaluation, by the data set's name.
    """
    records, parameters = runs.records(run), count(recipe.model)
    losses = [math.nan if step["loss"] is None else step["loss"] for step in records]
    loss = runs.final_loss(losses)
    evaluations = {data: json.loads(path.read_text(encoding="utf-8")) for data, path in answers.items()}
    return {
        "set": name,
        "encoders": [encoder.name for encoder in recipe.model.encoders],
        "run": str(run),
        "steps": len(records),
        "vision_parameters": parameters.vision,
        "parameters": parameters.total,
        "image_tokens": recipe.model.image_tokens,
        "tokens_per_second": statistics.median(step["tokens"] / step["seconds"] for step in records),
        "final_loss": loss if math.isfinite(loss) else None,
        "evaluations": {
            data: {"mean_accuracy": runs.mean_accuracy(of["tasks"]), "score": of.get("score"), "tasks": of["tasks"]}
            for data, of in evaluations.items()
        },
    }


def line(found: Row) -> str:
    """A row for the terminal."""
    if "failed" in found:
        return f"{found['set']}: {found['failed']}"
    asked = (f", {data} {_headline(of)[1]:.1%}" for data, of in found["evaluations"].items())
    return f"{found['set']}: final loss {_loss(found)}{''.join(asked)}"


def write(out: Path, recipe: Recipe, rows: Sequence[Row]) -> str:
    """Writes ``out``/sweep.json, sweep.md and sweep.png, and returns the page."""
    done = [found for found in rows if "failed" not in found]
    text = "\n".join(_page(recipe, rows, done)) + "\n"
    content = {"recipe": recipe.name, "rows": list(rows)}
    (out / "sweep.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "sweep.md").write_text(text, encoding="utf-8")
    if done:
        _draw(done, out / "sweep.png")
    return text


def _splits(done: Sequence[Row]) -> list[str]:
    return list(done[0]["evaluations"]) if done else []


def _tasks(done: Sequence[Row], *splits: str) -> list[str]:
    """Those that any set has answers of in ``splits``, in the order in which they are first met. A set has none of a
    task where every row of it was skipped."""
    return list(
        dict.fromkeys(task for name in splits for found in done for task in found["evaluations"][name]["tasks"])
    )


def _number(value: float, of: Mapping[str, Any], tasks: Sequence[str]) -> str:
    """``value``, a number over the tasks that an evaluation has: it says where these are not all of ``tasks``."""
    fewer = f", {len(of['tasks'])} of {len(tasks)} tasks" if len(of["tasks"]) < len(tasks) else ""
    return f"{value:.1%}{fewer}"


def _headline(of: Mapping[str, Any]) -> tuple[str, float]:
    """The one number of an evaluation, and what it is: CV-Bench's own where it is one."""
    score = of.get("score")
    return ("mean accuracy", of["mean_accuracy"]) if score is None else ("score", score)


def _loss(found: Row) -> str:
    return "not finite" if found["final_loss"] is None else f"{found['final_loss']:.4f}"


def _page(recipe: Recipe, rows: Sequence[Row], done: Sequence[Row]) -> Iterator[str]:
    yield f"# Encoder sets of {recipe.name}"
    yield ""
    yield (
        f"Written by `mmoe sweep`: the recipe {recipe.name} with each set of encoders alone, everything else as it is. "
        "Parameters: of the encoders and the connector, and all. Tokens/s: the median step's. Final loss: the mean "
        "over the last tenth of the steps. Of stages, the last one's numbers. Accuracies with their 95% intervals; "
        "their mean counts every task the same, CV-Bench's score as it is published."
    )
    splits = _splits(done)
    if any(len(found["evaluations"][split]["tasks"]) < len(_tasks(done, split)) for split in splits for found in done):
        yield from ("", "–: no answer of that task counts. Numbers over fewer tasks say so: compare them task by task.")
    yield ""
    if done:
        yield from ("![encoder sets](sweep.png)", "")
    titles = ["encoders", "vision", "all", "image tokens", "tokens/s", "final loss"]
    headlines = [[_headline(found["evaluations"][split]) for found in done] for split in splits]
    # CV-Bench's score needs both of its halves: a set that has one alone has no number beside the others' scores.
    kinds = ["score" if any(kind == "score" for kind, _ in column) else "mean accuracy" for column in headlines]
    yield from _header([*titles, *(f"{split}, {kind}" for split, kind in zip(splits, kinds, strict=True))])
    for place, found in enumerate(done):
        sizes = [f"{found[name]:,}" for name in ("vision_parameters", "parameters", "image_tokens")]
        means = [
            _number(column[place][1], found["evaluations"][split], _tasks(done, split))
            if column[place][0] == kind
            else "–"
            for split, kind, column in zip(splits, kinds, headlines, strict=True)
        ]
        yield _cells(found["set"], *sizes, f"{found['tokens_per_second']:,.0f}", _loss(found), *means)
    for found in rows:
        if "failed" in found:
            yield from ("", f"{found['set']} failed: {found['failed']}")
    for split in splits:
        yield from ("", f"## {split}", "")
        asked, tasks = [found["evaluations"][split] for found in done], _tasks(done, split)
        yield from _header(["encoders", *tasks, "mean"])
        for found, of in zip(done, asked, strict=True):
            shares = [_share(of["tasks"][task]) if task in of["tasks"] else "–" for task in tasks]
            yield _cells(found["set"], *shares, _number(of["mean_accuracy"], of, tasks))
        best = [next(of["tasks"][task]["majority"] for of in asked if task in of["tasks"]) for task in tasks]
        constant = [*best, statistics.fmean(best)]
        yield _cells("always the same answer", *(f"{share:.1%}" for share in constant))


def _header(titles: Sequence[str]) -> Iterator[str]:
    yield _cells(*titles)
    yield "|---" * len(titles) + "|"


def _cells(*values: str) -> str:
    return f"| {' | '.join(values)} |"


def _share(task: Mapping[str, Any]) -> str:
    return f"{task['accuracy']:.1%} ({task['low']:.1%} – {task['high']:.1%})"


def _draw(done: Sequence[Row], path: Path) -> None:
    splits = _splits(done)
    with mpl.rc_context(STYLE):
        size = (4.6 + 5.2 * len(splits), 1.6 + 0.55 * len(done))
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 1 + len(splits), sharey=True, squeeze=False)[0]
        _draw_loss(panels[0], done)
        for axes, split in zip(panels[1:], splits, strict=True):
            _draw_accuracy(axes, split, done)
        figure.savefig(path, dpi=110)


def _draw_loss(axes: Axes, done: Sequence[Row]) -> None:
    losses = [math.nan if found["final_loss"] is None else found["final_loss"] for found in done]
    axes.plot(losses, range(len(done)), "o", color=BLUE)
    axes.set_yticks(range(len(done)), [found["set"] for found in done])
    axes.set_ylim(len(done) - 0.5, -0.5)
    axes.set_title("Final loss")


def _draw_accuracy(axes: Axes, split: str, done: Sequence[Row]) -> None:
    """A colour a task, the same on every split, its interval a line, none where a set has no answer of it; black: the
    mean, hollow where it is one of fewer tasks."""
    tasks, colors = _tasks(done, split), mpl.colormaps["tab20"]
    every = sorted(_tasks(done, *_splits(done)))
    asked = [found["evaluations"][split] for found in done]
    for number, task in enumerate(tasks):
        shift = 0.6 * ((number + 0.5) / len(tasks) - 0.5)
        there = [place for place, of in enumerate(asked) if task in of["tasks"]]
        mine, places = [asked[place]["tasks"][task] for place in there], [place + shift for place in there]
        color = colors(every.index(task) % colors.N)
        axes.hlines(places, [one["low"] for one in mine], [one["high"] for one in mine], color=color, linewidth=1)
        axes.plot([one["accuracy"] for one in mine], places, "o", color=color, markersize=3.5, label=task)
    whole = [place for place, of in enumerate(asked) if len(of["tasks"]) == len(tasks)]
    fewer = [place for place in range(len(done)) if place not in whole]
    for places, label, face in ((whole, "mean", INK), (fewer, "mean of fewer tasks", "none")):
        if places:
            means = [asked[place]["mean_accuracy"] for place in places]
            axes.plot(means, places, "D", color=INK, markerfacecolor=face, markersize=5, label=label)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title(f"Accuracy, {split}")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
