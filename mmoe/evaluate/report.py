"""`mmoe report DIR`: the run as one page, report.html, and as one picture, report.png."""

import base64
import html
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmoe.evaluate import figures
from mmoe.evaluate.goodput import Goodput
from mmoe.evaluate.history import TOLD, History, read, seen
from mmoe.recipe import dump_recipe

EXAMPLES = 16

_STYLE = """
:root { --ink: #1b2733; --muted: #66788a; --rule: #d9dfe5; --green: #2d7a4b; --red: #b23a48; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 2rem 4rem; max-width: 75rem; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { margin: 0; font-size: 1.9rem; letter-spacing: -0.01em; }
h2 { margin: 2.75rem 0 0.75rem; padding-top: 1rem; border-top: 1px solid var(--rule); font-size: 1.15rem; }
p { max-width: 46rem; } .muted { color: var(--muted); }
.facts { display: flex; flex-wrap: wrap; gap: 0.5rem 2.5rem; margin: 1.5rem 0 0; }
.facts div { min-width: 6rem; } .facts dt { color: var(--muted); font-size: 0.8rem; }
.facts dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.panels { display: grid; grid-template-columns: 1fr 1fr; gap: 1.5rem 2rem; }
.panels img { display: block; width: 100%; min-width: 0; } .wide { grid-column: 1 / 3; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.9rem 0.4rem 0; border-bottom: 1px solid var(--rule); text-align: right;
  white-space: nowrap; }
th { color: var(--muted); font-weight: 500; font-size: 0.85rem; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
.examples { display: grid; grid-template-columns: 1fr 1fr 1fr 1fr; gap: 1.5rem; }
@media (max-width: 50rem) { .panels, .examples { grid-template-columns: 1fr; } .wide { grid-column: auto; } }
.examples figure { margin: 0; } .examples img { height: 9rem; max-width: 100%; object-fit: contain;
  object-position: left; image-rendering: pixelated; }
figcaption { font-size: 0.9rem; line-height: 1.35; } figcaption span { display: block; }
.right { color: var(--green); font-weight: 600; } .wrong { color: var(--red); font-weight: 600; }
pre { padding: 1rem; overflow-x: auto; border: 1px solid var(--rule); font-size: 0.8rem; line-height: 1.45; }
"""

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
    facts = _facts(history)
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


def _facts(history: History) -> dict[str, str]:
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
    name, description = html.escape(history.recipe.name), html.escape(history.recipe.description)
    yield f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{name}</title>'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<style>{_STYLE}</style>\n</head>\n<body>"
    yield f'<h1>{name}</h1>\n<p class="muted">{description}</p>'
    yield '<dl class="facts">'
    yield from (f"<div><dt>{html.escape(fact)}</dt><dd>{value}</dd></div>" for fact, value in facts.items())
    yield '</dl>\n<h2>Curves</h2>\n<div class="panels">'
    routed = history.recipe.model.moe is not None
    for draw, (kind, width, height) in (panel for panel in _PANELS if routed or panel[0] not in _OF_EXPERTS):
        # A file of its own: inline, the identifiers of one drawing would be those of the next.
        drawing = base64.b64encode(figures.svg(draw, history, width, height)).decode()
        yield f'<img class="{kind}" alt="{draw.__name__}" src="data:image/svg+xml;base64,{drawing}">'
    yield "</div>"
    if history.goodput:
        yield from _goodput(history.goodput)
    for split in _order(history):
        yield from _table(split, history.evaluations[split])
    for split, on, off in history.vision():
        yield from _vision(split, on, off, history)
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


def _vision(split: str, on: dict[str, Any], off: dict[str, Any], history: History) -> Iterator[str]:
    yield f'<h2>Vision on and off: {html.escape(split)}</h2>\n<div class="panels">'
    title = "Accuracy with pictures, without any, and by chance"
    drawing = figures.svg(lambda axes, _: figures.draw_vision(axes, on, off, title), history, 12.0, 3.9)
    source = f"data:image/svg+xml;base64,{base64.b64encode(drawing).decode()}"
    yield f'<img class="wide" alt="draw_vision" src="{source}">\n</div>\n<ul>'
    for task in (task for task in on["tasks"] if task in off["tasks"]):
        shares = [result["tasks"][task]["accuracy"] for result in (on, off)]
        points = 100 * (shares[0] - shares[1])
        name = html.escape(task.replace("_", " / "))
        yield f"<li>{name}: {shares[0]:.1%} with, {shares[1]:.1%} without: {points:+.1f} points</li>"
    yield "</ul>"


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
    asked = sorted({reason for result in history.evaluations.values() for reason in result["skipped"]})
    for where, reasons in (("In training", history.skipped), ("In evaluation", asked)):
        yield f"<p>{where}: {len(reasons) or 'none'}.</p>"
        yield f"<ul>{''.join(f'<li>{html.escape(reason)}</li>' for reason in reasons)}</ul>" if reasons else ""
