"""`mmoe report DIR`: the run as one page, report.html, and as one picture, report.png."""

import html
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmoe.evaluate import figures
from mmoe.evaluate.goodput import Goodput
from mmoe.evaluate.history import TOLD, History, read, seen
from mmoe.evaluate.page import drawing, opening
from mmoe.recipe import dump_recipe

EXAMPLES = 16

_HALF, _WIDE = ("half", 5.8, 3.1), ("wide", 12.0, 3.9)
_PANELS = [
    (figures.draw_loss, _HALF),
    (figures.draw_active, _HALF),
    (figures.draw_accuracy, _WIDE),
    (figures.draw_zero_share, _HALF),
    (figures.draw_busiest, _HALF),
    (figures.draw_load, _WIDE),
    (figures.draw_gradient, _HALF),
    (figures.draw_rate, _HALF),
]
_OF_EXPERTS = (figures.draw_active, figures.draw_zero_share, figures.draw_busiest, figures.draw_load)


def write(run: Path) -> None:
    """Write DIR/report.html, which needs no other file, and DIR/report.png, 1600 × 1000 pixels.

    They show what is there: metrics.jsonl, and the evaluations that `mmoe evaluate --json DIR/evaluation/NAME.json`
    wrote. Examples come from the first evaluation that has any, `test` before the others.

    Raises:
        UserError: ``run`` is not a run directory, or a file in it cannot be understood.
    """
    history = read(run)
    examples = _examples(history)
    facts = describe(history)
    line = "   ·   ".join(f"{value} {name}" for name, value in facts.items())
    (run / "report.png").write_bytes(figures.summary(history, history.recipe.name, line, examples))
    (run / "report.html").write_text("\n".join(_page(history, facts, examples)), encoding="utf-8")
    print(f"{run / 'report.html'}\n{run / 'report.png'}")


def _order(history: History) -> list[str]:
    """The evaluations: with pictures before those without, `test` before the others."""
    return sorted(
        history.evaluations, key=lambda name: (seen(history.evaluations[name]) != "shown", name != "test", name)
    )


def _examples(history: History) -> list[dict[str, Any]]:
    results = [history.evaluations[name] for name in _order(history)]
    shown = [result["examples"][:EXAMPLES] for result in results if seen(result) == "shown"]
    return next(filter(None, shown), [])


def describe(history: History) -> dict[str, str]:
    """The facts on top of a page: each value under its name."""
    samples, tokens = history.column("samples").sum(), history.column("tokens").sum()
    seconds = history.column("seconds").sum()
    minutes, rest = divmod(round(float(seconds)), 60)
    moe = history.recipe.model.moe
    routed = (
        {f"active experts, target {moe.active_experts:g}": f"{history.settled_active_experts():.2f}"} if moe else {}
    )
    goodput = history.goodput
    survived = {"goodput": f"{goodput.share:.0%}", "restarts": str(len(goodput.starts) - 1)} if goodput else {}
    return {
        "steps": f"{len(history.rows):,} of {history.recipe.train.steps:,}",
        "samples": f"{int(samples):,}",
        "tokens": f"{tokens / 1e6:,.2f} M",
        "in training": f"{minutes} min {rest:02d} s",
        **routed,
        **survived,
    }


def _page(history: History, facts: dict[str, str], examples: list[dict[str, Any]]) -> Iterator[str]:
    yield from opening(history.recipe.name, history.recipe.description, facts)
    yield '<h2>Curves</h2>\n<div class="panels">'
    routed = history.recipe.model.moe is not None
    for draw, (kind, width, height) in (panel for panel in _PANELS if routed or panel[0] not in _OF_EXPERTS):
        yield drawing(kind, draw.__name__, figures.svg(draw, history, width, height))
    yield "</div>"
    if history.goodput:
        yield from _goodput(history.goodput)
    for split in _order(history):
        yield from _table(split, history.evaluations[split])
    for split, on, off in history.vision():
        yield from vision(split, on, off, history)
    if history.losses:
        yield from _losses(history.losses)
    yield "<h2>Answers</h2>"
    yield '<p class="muted">Of each task in turn the first question about a picture not yet shown; none is chosen.</p>'
    yield '<div class="examples">'
    yield from map(_example, examples)
    yield "</div>\n<h2>Skipped samples</h2>"
    yield from _skipped(history)
    yield f"<h2>Recipe</h2>\n<pre>{html.escape(dump_recipe(history.recipe))}</pre>\n</body>\n</html>"


def _goodput(goodput: Goodput) -> Iterator[str]:
    yield "<h2>Starts and goodput</h2>"
    rest = goodput.wall - goodput.steps - goodput.lost - goodput.checkpoints
    parts = {
        "in steps that count": goodput.steps,
        "in steps done again after a restart": goodput.lost,
        "standing still for checkpoints": goodput.checkpoints,
        "starting, or not running": max(rest, 0.0),
    }
    shares = (f"{seconds:,.1f} s {name} ({seconds / max(goodput.wall, 1e-9):.1%})" for name, seconds in parts.items())
    yield f"<p>Of {goodput.wall:,.1f} s from the first start: {'; '.join(shares)}.</p>"
    yield '<div class="scroll"><table>'
    names = ("started", "after step", "ranks", "steps lost", "seconds lost", "hosts", "how the one before ended")
    yield f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>"
    for start in goodput.starts:
        when = datetime.fromtimestamp(start.time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        numbers = [f"{start.step:,}", str(start.ranks), str(start.lost_steps), f"{start.lost_seconds:.1f}"]
        cells = [when, *numbers, ", ".join(start.hosts), start.before]
        yield f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
    yield "</table></div>"


def _table(split: str, result: dict[str, Any]) -> Iterator[str]:
    told = TOLD[seen(result)]
    title = f"{split} ({told})" if told else split
    yield f'<h2>Accuracy on {html.escape(title)}</h2>\n<div class="scroll"><table>'
    names = ("task", "n", "accuracy", "95% interval", "chance", "majority", "majority answer")
    yield f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>"
    for task, row in result["tasks"].items():
        interval = f"{row['low']:.1%} – {row['high']:.1%}"
        shares = [f"{row['accuracy']:.1%}", interval, f"{row['chance']:.1%}", f"{row['majority']:.1%}"]
        cells = [task.replace("_", " / "), f"{row['n']:,}", *shares, row["majority_answer"]]
        yield f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
    yield "</table></div>"


def vision(split: str, on: dict[str, Any], off: dict[str, Any], history: History) -> Iterator[str]:
    """The figure of an evaluation with pictures and without any, and each task's difference."""
    yield f'<h2>Vision on and off: {html.escape(split)}</h2>\n<div class="panels">'
    title = "Accuracy with pictures, without any, and by chance"
    panel = figures.svg(lambda axes, _: figures.draw_vision(axes, on, off, title), history, 12.0, 3.9)
    yield drawing("wide", "draw_vision", panel)
    yield "</div>\n<ul>"
    for task in (task for task in on["tasks"] if task in off["tasks"]):
        shares = [result["tasks"][task]["accuracy"] for result in (on, off)]
        points = 100 * (shares[0] - shares[1])
        name = html.escape(task.replace("_", " / "))
        yield f"<li>{name}: {shares[0]:.1%} with, {shares[1]:.1%} without: {points:+.1f} points</li>"
    yield "</ul>"


def _losses(losses: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield '<h2>Held-out loss, nats per token</h2>\n<div class="scroll"><table>'
    yield "<tr><th>data</th><th>tokens</th><th>loss</th><th>by task</th></tr>"
    for name, result in losses.items():
        told = TOLD[seen(result)]
        title = f"{name} ({told})" if told else name
        tasks = ", ".join(f"{task.replace('_', ' / ')} {row['loss']:.3f}" for task, row in result["tasks"].items())
        cells = [title, f"{result['tokens']:,}", f"{result['loss']:.4f}", tasks]
        yield f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
    yield "</table></div>"


def _example(example: dict[str, Any]) -> str:
    right = example["answer"] == example["truth"]
    answer = html.escape(example["answer"].strip())
    truth = "" if right else f" — it is {html.escape(example['truth'].strip())}"
    return (
        f'<figure><img alt="{html.escape(example["sample"])}" src="data:image/png;base64,{example["png"]}">'
        f'<figcaption><span class="muted">{html.escape(example["prompt"])}</span>'
        f'<span class="{"right" if right else "wrong"}">{answer}{truth}</span></figcaption></figure>'
    )


def _skipped(history: History) -> Iterator[str]:
    results = (*history.evaluations.values(), *history.losses.values())
    asked = sorted({reason for result in results for reason in result["skipped"]})
    for where, reasons in (("In training", history.skipped), ("In evaluation", asked)):
        yield f"<p>{where}: {len(reasons) or 'none'}.</p>"
        yield f"<ul>{''.join(f'<li>{html.escape(reason)}</li>' for reason in reasons)}</ul>" if reasons else ""
