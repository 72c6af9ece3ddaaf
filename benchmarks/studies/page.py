"""What was found, as a page with a section and a figure a study."""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.studies.arms import STUDIES, Arm, Study
from mmoe.evaluate.figures import AMBER, BLUE, GREEN, STYLE, smooth

T_95 = {3: 4.303}
"""Student's t for a two-sided 95% interval of the mean of so many runs."""
HEAD = """# Ablations

Written by `mmoe bench ablations`: the quickstart's model and data, 8 packs a step. Final loss: the mean over the last \
tenth of the steps, on samples not seen before; ± is half the 95% interval of the mean over seeds.
"""
COLUMNS = "| | final loss | by seed | FFN experts a token |"
COLORS = (BLUE, AMBER, GREEN)


@dataclass(frozen=True)
class Result:
    """Of an arm."""

    arm: Arm
    finals: list[float]
    """By seed; infinite for a run that diverged."""
    curves: list[list[float]]
    """Losses by step."""
    active: float
    """FFN experts a token, mean of the runs."""
    connector: int
    """Its parameters."""
    accuracy: dict[str, list[float]]
    """By task and seed, likewise; of a study that asks questions."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.finals)


def interval(values: list[float], form: str = ".4f") -> str:
    """The mean and, of several, half the width of its 95% interval."""
    mean, n = statistics.fmean(values), len(values)
    if not math.isfinite(mean):
        return "diverged"
    half = T_95[n] * statistics.stdev(values) / math.sqrt(n) if n > 1 else 0.0
    return f"{mean:{form}}" + (f" ± {half:{form}}" if n > 1 else "")


def _draw_curves(axes: Axes, results: list[Result]) -> None:
    for result, color in zip(results, COLORS, strict=False):
        curves = np.array([smooth(np.array(curve), max(3, len(curve) // 20)) for curve in result.curves])
        steps = np.arange(1, curves.shape[1] + 1)
        axes.plot(steps, curves.mean(0), color=color, label=result.arm.name)
        axes.fill_between(steps, curves.min(0), curves.max(0), color=color, alpha=0.2, linewidth=0)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, mean and range over seeds")


def _draw_sweep(axes: Axes, results: list[Result]) -> None:
    for name, color in zip(dict.fromkeys(result.arm.name for result in results), COLORS, strict=False):
        mine = [result for result in results if result.arm.name == name]
        rates = [result.arm.rate for result in mine]
        axes.plot(rates, [result.mean for result in mine], "o-", color=color, label=name)
        low, high = ([pick(result.finals) for result in mine] for pick in (min, max))
        axes.fill_between(rates, low, high, color=color, alpha=0.2, linewidth=0)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate of the recipe")
    axes.set_ylabel("final loss, mean and range over seeds")


def _draw(study: Study, results: list[Result], path: Path) -> None:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        (_draw_sweep if study.sweeps else _draw_curves)(axes, results)
        axes.set_title(study.title)
        axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)


def write(out: Path, name: str, results: list[Result], seeds: tuple[int, ...]) -> str:
    """Writes a study's figure and its section of the page in ``out``, and returns that; sections of other studies stay
    as they are."""
    study, page = STUDIES[name], out / "ablations.md"
    _draw(study, results, out / "ablations" / f"{name}.png")
    _, *sections = page.read_text().split("\n## ") if page.exists() else [""]
    known = {section.partition("\n")[0]: section.strip() for section in sections}
    known[study.title] = "\n".join(_section(name, results, seeds))
    ordered = (known[study.title] for study in STUDIES.values() if study.title in known)
    page.write_text("".join((HEAD, *(f"\n## {section}\n" for section in ordered))))
    return known[study.title]


def _section(name: str, results: list[Result], seeds: tuple[int, ...]) -> Iterator[str]:
    study = STUDIES[name]
    length = f"{len(results[0].curves[0])} steps, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    yield from (study.title, "", f"{study.question} {length}.", "", f"![{study.title}](ablations/{name}.png)", "")
    yield from (*_table(study, results), "", *_conclusions(study, results))


def _table(study: Study, results: list[Result]) -> Iterator[str]:
    yield COLUMNS + (" connector's parameters |" if study.test else "")
    yield "|---|---|---|---|" + ("---|" if study.test else "")
    for result in results:
        label = f"{result.arm.name}, {result.arm.rate:g}" if study.sweeps else result.arm.name
        by_seed = ", ".join(f"{loss:.4f}" for loss in result.finals)
        count = f" {result.connector:,} |" if study.test else ""
        yield f"| {label} | {interval(result.finals)} | {by_seed} | {result.active:.2f} |{count}"
    if study.test:
        yield from ("", f"Accuracy on {study.test}:", "")
        yield f"| | {' | '.join(result.arm.name for result in results)} |"
        yield "|---" * (len(results) + 1) + "|"
        for task in sorted({task for result in results for task in result.accuracy}):
            cells = (_percent(result.accuracy.get(task, [math.inf])) for result in results)
            yield f"| {task} | {' | '.join(cells)} |"
        yield f"| mean over tasks | {' | '.join(_percent(_over_tasks(result)) for result in results)} |"


def _percent(shares: list[float]) -> str:
    return interval(shares, ".1%")


def _over_tasks(result: Result) -> list[float]:
    """The mean accuracy, by seed."""
    by_seed = list(zip(*result.accuracy.values(), strict=True))
    return [statistics.fmean(shares) for shares in by_seed] or [math.inf] * len(result.finals)


def _conclusions(study: Study, results: list[Result]) -> Iterator[str]:
    if study.sweeps:
        for name in dict.fromkeys(result.arm.name for result in results):
            best = min((result for result in results if result.arm.name == name), key=lambda result: result.mean)
            rates = [result.arm.rate for result in results if result.arm.name == name]
            edge = ", at the edge of the grid" if best.arm.rate in (min(rates), max(rates)) else ""
            yield f"- {name}: best at {best.arm.rate:g}{edge}, {interval(best.finals)}"
        return
    first, *others = results
    mark = "- " if len(others) > 1 else ""
    for other in others:
        found = interval(_minus(other.finals, first.finals))
        if study.test:
            found += f"; mean accuracy {_percent(_minus(_over_tasks(other), _over_tasks(first)))}"
        yield f"{mark}{other.arm.name} minus {first.arm.name}, the same seeds: {found}"


def _minus(theirs: list[float], ours: list[float]) -> list[float]:
    return [a - b for a, b in zip(theirs, ours, strict=True)]
