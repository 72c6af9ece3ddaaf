"""The pictures of a report, each drawn on axes that the caller lays out."""

import base64
import io
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.image
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from mmoe.evaluate.history import History, seen

INK, MUTED, RULE, PAPER = "#1b2733", "#66788a", "#d9dfe5", "#ffffff"
BLUE, AMBER, GREEN, RED = "#2a6f97", "#c98a1b", "#2d7a4b", "#b23a48"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": PAPER,
    "svg.hashsalt": "mmoe",
}


def smooth(values: NDArray[np.float64], span: int) -> NDArray[np.float64]:
    """Mean over a centred window of ``span`` steps, shorter at the ends; steps without a number are left out."""
    known = np.isfinite(values)
    total = np.concatenate(([0.0], np.cumsum(np.where(known, values, 0.0))))
    count = np.concatenate(([0], np.cumsum(known)))
    middle = np.arange(len(values))
    low, high = np.maximum(middle - span // 2, 0), np.minimum(middle + span // 2 + 1, len(values))
    n = count[high] - count[low]
    return np.where(n > 0, (total[high] - total[low]) / np.maximum(n, 1), np.nan)


def _line(axes: Axes, run: History, name: str, color: str, label: str | None = None) -> None:
    """The numbers themselves, pale, below their running mean, stage by stage."""
    values, steps, span = run.column(name), run.steps, max(1, len(run.rows) // 50)
    for rows in run.parts():
        axes.plot(steps[rows], values[rows], color=color, linewidth=0.6, alpha=0.3)
        axes.plot(steps[rows], smooth(values[rows], span), color=color, linewidth=1.6, label=label)
    over_steps(axes, run)


NARROW = 0.08
"""Share of all steps: a stage of less has no room for a label."""


def over_steps(axes: Axes, run: History) -> None:
    """The horizontal axis of a drawing over all steps: a line where a stage begins, and the stages' names."""
    steps = run.steps
    if run.stages:
        axes.margins(y=0.12)  # room for the names
    for rows, (_, name) in zip(run.parts(), run.stages, strict=False):
        first = 0.0 if not rows.start else float(steps[rows.start - 1])
        if first:
            axes.axvline(first, color=MUTED, linewidth=0.8, linestyle=(0, (3, 2)), zorder=1.5)
        if float(steps[rows.stop - 1]) - first < NARROW * float(steps[-1]):
            continue  # its name would run into the next one's
        place = {"xycoords": axes.get_xaxis_transform(), "xytext": (3, -2), "textcoords": "offset points"}
        axes.annotate(name, (first, 1.0), color=MUTED, fontsize=8, va="top", **place)
    axes.set_xlabel("step")
    axes.set_xlim(0, float(steps[-1]))


def draw_loss(axes: Axes, run: History) -> None:
    _line(axes, run, "loss", BLUE)
    scale_of_losses(axes, float(np.nanmin(run.column("loss"))), float(np.nanmax(run.column("loss"))))
    axes.set_title("Training loss, nats per answer token")


def scale_of_losses(axes: Axes, low: float, high: float) -> None:
    """A logarithmic axis with round numbers between ``low`` and ``high``."""
    axes.set_yscale("log")
    ticks = [tick for tick in (0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 8, 12) if low * 0.9 < tick < high * 1.1]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def draw_gradient(axes: Axes, run: History) -> None:
    _line(axes, run, "grad_norm", BLUE)
    axes.set_yscale("log")
    axes.set_title("Gradient norm before clipping")


def draw_rate(axes: Axes, run: History) -> None:
    for rows in run.parts():
        axes.plot(run.steps[rows], run.column("lr")[rows], color=BLUE, linewidth=1.6)
    over_steps(axes, run)
    axes.set_ylim(0, None)
    axes.ticklabel_format(axis="y", scilimits=(0, 0))
    axes.set_title("Learning rate")


def draw_active(axes: Axes, run: History) -> None:
    moe = run.moe
    uniform = moe.top_k * moe.experts / (moe.experts + moe.zero_experts)
    _line(axes, run, "active_experts_mean", BLUE, "mean over tokens")
    axes.axhline(moe.active_experts, color=GREEN, linewidth=1.4, linestyle=(0, (5, 3)))
    axes.axhline(uniform, color=MUTED, linewidth=1.0, linestyle=(0, (1, 2)))
    end = float(run.steps[-1])
    place = {"ha": "right", "xytext": (0, -5), "textcoords": "offset points"}
    axes.annotate(f"target {moe.active_experts:g}", (end, moe.active_experts), color=GREEN, va="top", **place)
    if abs(uniform - moe.active_experts) > 0.05:
        axes.text(end, uniform, f"uniform routing {uniform:g}", color=MUTED, ha="right", va="bottom")
    axes.set_ylim(0, moe.top_k)
    axes.set_title(f"Active FFN experts per token, of {moe.top_k} selected")


def draw_zero_share(axes: Axes, run: History) -> None:
    _line(axes, run, "zero_expert_share", AMBER)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title("Selections that went to zero experts")


def draw_busiest(axes: Axes, run: History) -> None:
    _line(axes, run, "expert_load_max", BLUE)
    axes.set_ylim(0, None)
    axes.set_title("Busiest FFN expert's load, even share = 1")


def draw_load(axes: Axes, run: History) -> None:
    """Rows: the experts, layer under layer; columns: time; colour: share of the layer's selections."""
    steps, loads = run.loads()
    moe = run.moe
    axes.set_title("Expert load over time, share of a layer's selections")
    axes.grid(visible=False)
    if not len(steps):
        axes.text(0.5, 0.5, "no load was logged", transform=axes.transAxes, ha="center", color=MUTED)
        axes.set_axis_off()
        return
    layers, slots = loads.shape[1:]
    # An empty row parts the layers.
    rows = np.full((layers * (slots + 1) - 1, len(steps)), np.nan)
    for layer in range(layers):
        rows[layer * (slots + 1) : layer * (slots + 1) + slots] = loads[:, layer].T
    extent = (0.0, float(steps[-1]), rows.shape[0] - 0.5, -0.5)
    top = float(np.nanquantile(rows, 0.995)) or 1.0
    image = axes.imshow(rows, aspect="auto", cmap="Blues", vmin=0, vmax=top, extent=extent, interpolation="nearest")
    middles = [
        (layer * (slots + 1) + offset, f"{kind} {layer + 1}")
        for layer in range(layers)
        for offset, kind, size in (
            ((moe.experts - 1) / 2, "FFN, layer", moe.experts),
            (moe.experts + (moe.zero_experts - 1) / 2, "zero, layer", moe.zero_experts),
        )
        if size
    ]
    for layer in range(layers if moe.zero_experts else 0):
        axes.axhline(layer * (slots + 1) + moe.experts - 0.5, color=AMBER, linewidth=1.0)
    axes.set_yticks([place for place, _ in middles], [text for _, text in middles])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("step")
    figure = axes.get_figure()
    assert figure is not None
    place = axes.inset_axes((1.012, 0.0, 0.015, 1.0))
    bar = figure.colorbar(image, cax=place, format=PercentFormatter(1, decimals=0))
    bar.outline.set_visible(False)  # type: ignore[operator]


def name_tasks(axes: Axes, handles: Sequence[Line2D], tasks: Sequence[str]) -> None:
    """The legend, and the axes of shares over tasks, of a figure that also marks chance and majority."""
    handles = [
        *handles,
        Line2D([], [], color=MUTED, marker="|", linestyle="", markersize=9, label="chance"),
        Line2D([], [], color=INK, marker="D", linestyle="", markersize=4.5, markerfacecolor=PAPER, label="majority"),
    ]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.09), ncol=len(handles))
    axes.set_yticks(range(len(tasks)), [task.replace("_", " / ") for task in tasks], color=INK)
    axes.set(xlim=(0, 1), ylim=(-0.6, len(tasks) - 0.4))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def draw_accuracy(axes: Axes, run: History) -> None:
    """A line a task; for each evaluation its accuracy with the 95% interval, chance and majority beside it."""
    shown = {name: result for name, result in run.evaluations.items() if seen(result) == "shown"}
    tasks = sorted({task for result in shown.values() for task in result["tasks"]}, reverse=True)
    axes.set_title("Accuracy by task, with 95% intervals")
    if not tasks:
        axes.text(0.5, 0.5, "not evaluated yet", transform=axes.transAxes, ha="center", color=MUTED)
        axes.set_axis_off()
        return
    colors = dict(zip(sorted(shown, key=lambda name: name != "test"), (BLUE, AMBER, GREEN, RED), strict=False))
    for number, (name, color) in enumerate(colors.items()):
        offset = 0.16 * (len(colors) - 1) - 0.32 * number
        for place, task in enumerate(tasks):
            row = shown[name]["tasks"].get(task)
            if row is None:
                continue
            y = place + offset
            axes.plot([row["low"], row["high"]], [y, y], color=color, linewidth=3.2, alpha=0.45, solid_capstyle="butt")
            axes.plot(row["accuracy"], y, "o", color=color, markersize=6, clip_on=False)
            axes.plot(row["chance"], y, "|", color=MUTED, markersize=9, markeredgewidth=1.4)
            axes.plot(row["majority"], y, "D", markersize=4.5, markerfacecolor=PAPER, markeredgecolor=INK)
            axes.text(1.02, y, f"{row['accuracy']:.1%}", color=color, va="center", fontsize=8.5)
    handles = [
        Line2D([], [], color=color, marker="o", linewidth=3.2, label=f"{name}, n ≥ {_least(shown[name])}")
        for name, color in colors.items()
    ]
    name_tasks(axes, handles, tasks)


def draw_vision(axes: Axes, on: dict[str, Any], off: dict[str, Any], title: str) -> None:
    """Bars a task: with pictures, without any, and guessing; the first two with their 95% intervals."""
    tasks = [task for task in on["tasks"] if task in off["tasks"]]
    places = np.arange(len(tasks))
    for offset, result, color, label in ((-0.27, on, BLUE, "vision on"), (0.0, off, AMBER, "vision off")):
        rows = [result["tasks"][task] for task in tasks]
        shares = np.array([row["accuracy"] for row in rows])
        ends = np.array([[row["low"] for row in rows], [row["high"] for row in rows]])
        bars = {"yerr": np.abs(ends - shares), "ecolor": INK, "error_kw": {"elinewidth": 0.8}}
        axes.bar(places + offset, shares, 0.25, color=color, label=label, **bars)
    axes.bar(places + 0.27, [on["tasks"][task]["chance"] for task in tasks], 0.25, color=RULE, label="chance")
    axes.set_xticks(places, [task.replace("_", " / ") for task in tasks], color=INK)
    axes.set(ylim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(visible=False, axis="x")
    axes.tick_params(axis="x", length=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), ncol=3)
    axes.set_title(title)


def _least(result: dict[str, Any]) -> int:
    return min(row["n"] for row in result["tasks"].values())


def draw_example(axes: Axes, example: dict[str, Any]) -> None:
    """A picture, the question below it, and the answer: green where it is right, else red with the truth."""
    picture = matplotlib.image.imread(io.BytesIO(base64.b64decode(example["png"])), format="png")
    height, width = picture.shape[:2]
    side = max(height, width)
    # On a square, standing on its lower edge, so that the text below starts at one height in a row.
    axes.imshow(picture, interpolation="nearest", extent=(0, width, height, 0))
    axes.set(xlim=(0, side), ylim=(height, height - side))
    axes.set_axis_off()
    right = example["answer"] == example["truth"]
    question = textwrap.wrap(example["prompt"], 22)[:3]
    answer = example["answer"].strip() if right else f"{example['answer'].strip()}, not {example['truth'].strip()}"
    place = {"transform": axes.transAxes, "va": "top", "fontsize": 7.4, "linespacing": 1.25}
    axes.text(0, -0.05, "\n".join(question), color=MUTED, **place)
    answer = "\n".join(textwrap.wrap(answer, 19))
    axes.text(0, -0.05 - 0.117 * len(question), answer, color=GREEN if right else RED, fontweight="bold", **place)


def svg(draw: Callable[[Axes, History], None], run: History, width: float, height: float) -> bytes:
    """One drawing as an SVG file; ``width`` and ``height`` in inches."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot(), run)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def summary(run: History, headline: str, facts: str, examples: list[dict[str, Any]]) -> bytes:
    """The whole run at a glance, a PNG of 1600 × 1000 pixels."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(16, 10), dpi=100)
        FigureCanvasAgg(figure)
        figure.text(0.035, 0.955, headline, fontsize=19, fontweight="bold", va="center")
        figure.text(0.035, 0.92, facts, fontsize=10.5, color=MUTED, va="center")
        left = figure.add_gridspec(3, 1, left=0.075, right=0.455, top=0.865, bottom=0.06, hspace=0.42)
        draw_loss(figure.add_subplot(left[0]), run)
        beside = (draw_active, draw_load) if run.recipe.model.moe else (draw_gradient, draw_rate)
        for place, draw in enumerate(beside, start=1):
            draw(figure.add_subplot(left[place]), run)
        right = figure.add_gridspec(1, 1, left=0.565, right=0.94, top=0.865, bottom=0.475)
        draw_accuracy(figure.add_subplot(right[0]), run)
        figure.text(0.51, 0.378, "Answers on unseen scenes", fontsize=10.5, fontweight="bold")
        pictures = figure.add_gridspec(2, 6, left=0.51, right=0.985, top=0.362, bottom=0.075, wspace=0.14, hspace=0.66)
        for place, example in enumerate(examples[:12]):
            draw_example(figure.add_subplot(pictures[divmod(place, 6)]), example)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
