"""The pictures of a report over several stages, beside those of :mod:`mmoe.evaluate.figures`."""

import base64
import io
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.image
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mmoe.evaluate import figures
from mmoe.evaluate.figures import AMBER, BLUE, GREEN, INK, MUTED, PAPER, RED, RULE, name_tasks
from mmoe.evaluate.history import History
from mmoe.evaluate.stages import Whole

COLORS = (BLUE, AMBER, GREEN, RED)


class Asked(NamedTuple):
    """A question about a picture, and what each stage answered; None where a stage was not asked."""

    example: dict[str, Any]
    answers: list[str | None]


def stage_colors(count: int) -> list[Any]:
    """From pale to dark: the last stage is the one to look at."""
    return [mpl.colormaps["Blues"](0.35 + 0.55 * (k + 1) / count) for k in range(count)]


def draw_speed(axes: Axes, run: History) -> None:
    speed, steps = run.column("tokens") / run.column("seconds"), run.steps
    for rows in run.parts():
        axes.plot(steps[rows], speed[rows], color=BLUE, linewidth=0.6, alpha=0.3)
        span = max(1, len(run.rows) // 50)
        axes.plot(steps[rows], figures.smooth(speed[rows], span), color=BLUE, linewidth=1.6)
    figures.over_steps(axes, run)
    axes.set_ylim(0, None)
    axes.set_title("Tokens per second")


def draw_held_out(axes: Axes, whole: Whole) -> None:
    """A line a data set, from a stage's beginning (a ring) to its end (a dot); a dot in a ring: handed over as is."""
    steps = whole.history.steps
    values: list[float] = []
    names = whole.losses()
    for name, color in zip(names, COLORS * len(names), strict=False):
        for stage, rows in zip(whole.stages, whole.history.parts(), strict=True):
            first, last = float(steps[rows.start - 1]) if rows.start else 0.0, float(steps[rows.stop - 1])
            start, end = stage.start(name), stage.losses().get(name)
            points = [(x, y) for x, y in ((first, start and start.loss), (last, end)) if y is not None]
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1.6) if len(points) > 1 else None
            values += [y for _, y in points]
            if start:
                axes.plot(first, start.loss, "o", color=color, markerfacecolor="none", markersize=9, clip_on=False)
            if end is not None:
                axes.plot(last, end, "o", color=color, markersize=5, clip_on=False)
                narrow = last - first < figures.NARROW * float(steps[-1])
                place = {"xytext": (-7, -12 if narrow else 5), "textcoords": "offset points"}
                place |= {"ha": "right", "fontsize": 8}
                axes.annotate(f"{end:.2f}", (last, end), color=color, **place)
    axes.set_title("Held-out loss: ○ a stage begins, ● ends")
    if not values:
        axes.text(0.5, 0.5, "not evaluated yet", transform=axes.transAxes, ha="center", color=MUTED)
        axes.set_axis_off()
        return
    figures.over_steps(axes, whole.history)
    figures.scale_of_losses(axes, min(values), max(values))
    axes.set_ylim(min(values) * 0.85, max(values) * 1.35)
    handles = [
        Line2D([], [], color=color, marker="o", markersize=5, label=label(name))
        for name, color in zip(names, COLORS * len(names), strict=False)
    ]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncol=len(handles))


def label(name: str) -> str:
    """An evaluation's name without what all of them begin with."""
    return name.removeprefix("loss-")


def draw_accuracy(axes: Axes, whole: Whole, name: str) -> None:
    """A line a task of the evaluation ``name``, and on it each stage's accuracy; chance and majority beside it."""
    results = [stage.history.evaluations.get(name) for stage in whole.stages]
    tasks = sorted({task for result in results if result for task in result["tasks"]}, reverse=True)
    axes.set_title(f"Accuracy{f' on {name}' if name else ''}, stage by stage")
    if not tasks:
        axes.text(0.5, 0.5, "not evaluated yet", transform=axes.transAxes, ha="center", color=MUTED)
        axes.set_axis_off()
        return
    colors = stage_colors(len(results))
    for y, task in enumerate(tasks):
        rows = [(color, result["tasks"][task]) for color, result in zip(colors, results, strict=True)
                if result and task in result["tasks"]]  # fmt: skip
        shares = [row["accuracy"] for _, row in rows]
        axes.plot([min(shares), max(shares)], [y, y], color=RULE, linewidth=2, zorder=1)
        for color, row in rows:
            axes.plot(row["accuracy"], y, "o", color=color, markersize=7, clip_on=False)
        axes.plot(rows[-1][1]["chance"], y, "|", color=MUTED, markersize=9, markeredgewidth=1.4)
        axes.plot(rows[-1][1]["majority"], y, "D", markersize=4.5, markerfacecolor=PAPER, markeredgecolor=INK)
        axes.text(1.02, y, f"{shares[-1]:.1%}", color=rows[-1][0], va="center", fontsize=8.5)
    handles = [
        Line2D([], [], color=color, marker="o", linestyle="", markersize=7, label=stage.name)
        for color, stage in zip(colors, whole.stages, strict=True)
    ]
    name_tasks(axes, handles, tasks)


def draw_asked(axes: Axes, asked: Asked, names: Sequence[str]) -> None:
    """A picture, the question and its answer, and below them what each stage said."""
    example = asked.example
    picture = matplotlib.image.imread(io.BytesIO(base64.b64decode(example["png"])), format="png")
    height, width = picture.shape[:2]
    side = max(height, width)
    axes.imshow(picture, interpolation="nearest", extent=(0, width, height, 0))
    axes.set(xlim=(0, side), ylim=(height, height - side))
    axes.set_axis_off()
    lines = [(text, MUTED, "normal") for text in textwrap.wrap(example["prompt"], 20)[:3]]
    for name, given in zip(names, asked.answers, strict=True):
        if given is not None:
            right = given == example["truth"]
            said = textwrap.shorten(f"{name}: {given.strip()}", 23, placeholder="…")
            lines.append((said, GREEN if right else RED, "bold"))
    if any(given not in (None, example["truth"]) for given in asked.answers):
        lines.append((textwrap.shorten(f"it is {example['truth'].strip()}", 23, placeholder="…"), INK, "normal"))
    for number, (text, color, weight) in enumerate(lines):
        place = {"xycoords": axes.transAxes, "xytext": (0, -5 - 10.5 * number), "textcoords": "offset points"}
        axes.annotate(text, (0, 0), color=color, fontweight=weight, va="top", fontsize=7.3, **place)


def summary(whole: Whole, facts: str, cards: Sequence[Sequence[str]], asked: Sequence[Asked]) -> bytes:
    """The whole run at a glance, a PNG of 1600 × 1200 pixels; ``cards``: for each stage its name and what it is."""
    run = whole.history
    with mpl.rc_context(figures.STYLE):
        figure = Figure(figsize=(16, 12), dpi=100)
        FigureCanvasAgg(figure)
        figure.text(0.035, 0.962, whole.recipe.name, fontsize=19, fontweight="bold", va="center")
        figure.text(0.035, 0.934, facts, fontsize=10.5, color=MUTED, va="center")
        colors = stage_colors(len(cards))
        for number, (name, *lines) in enumerate(cards):
            x, y = 0.035 + 0.95 * number / len(cards), 0.905
            bar = [x, y, 0.95 / len(cards) - 0.012, 0.004]
            figure.add_axes((bar[0], bar[1], bar[2], bar[3]), facecolor=colors[number]).set(xticks=[], yticks=[])
            figure.text(x, y - 0.008, f"{number + 1}  {name}", fontsize=11, fontweight="bold", va="top")
            figure.text(x, y - 0.029, "\n".join(lines), fontsize=9, color=MUTED, va="top", linespacing=1.45)
        left = figure.add_gridspec(3, 1, left=0.06, right=0.475, top=0.79, bottom=0.05, hspace=0.4)
        figures.draw_loss(figure.add_subplot(left[0]), run)
        draw_held_out(figure.add_subplot(left[1]), whole)
        last = figures.draw_active if run.recipe.model.moe else figures.draw_rate
        last(figure.add_subplot(left[2]), run)
        right = figure.add_gridspec(1, 1, left=0.585, right=0.94, top=0.79, bottom=0.475)
        shown = whole.evaluations()
        draw_accuracy(figure.add_subplot(right[0]), whole, shown[0] if shown else "")
        figure.text(0.53, 0.398, "The same questions, stage by stage", fontsize=10.5, fontweight="bold")
        pictures = figure.add_gridspec(2, 6, left=0.53, right=0.985, top=0.385, bottom=0.1, wspace=0.14, hspace=1.05)
        for place, one in enumerate(asked[:12]):
            draw_asked(figure.add_subplot(pictures[divmod(place, 6)]), one, [stage.name for stage in whole.stages])
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
