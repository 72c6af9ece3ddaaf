"""`mmoe report DIR` of a run of several stages: all of them on one page and in one picture. A run without stages, and
each stage for itself, has the page of :mod:`mmoe.evaluate.report`."""

import html
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from mmoe.evaluate import figures, report, stages_figures
from mmoe.evaluate.history import TOLD, History, seen
from mmoe.evaluate.page import drawing, opening, stage_table
from mmoe.evaluate.stages import Stage, Start, Whole, read_whole
from mmoe.evaluate.stages_figures import Asked
from mmoe.recipe import dump_recipe, load_recipe

EXAMPLES = 16
_HALF, _WIDE = (5.8, 3.1), (12.0, 3.9)
_SCORES = ("score", "score_2d", "score_3d")
"""What an evaluation may have beside its tasks: CV-Bench's means over them."""


def write(run: Path) -> None:
    """Write DIR/report.html, which needs no other file, and DIR/report.png.

    They show what is there of the stages' metrics.jsonl and evaluations: DIR/N-NAME/evaluation/NAME.json of a stage's
    last checkpoint, and, of the suite ``loss``, DIR/N-NAME/evaluation/begin/NAME.json of what it begins with.

    Raises:
        UserError: ``run`` is not a run directory, or a file in it cannot be understood.
    """
    file = run / "recipe.toml"
    if not file.is_file() or not load_recipe(file).stages:
        report.write(run)
        return
    whole = read_whole(run)
    facts, asked = _facts(whole), _asked(whole)
    line = "   ·   ".join(f"{value} {name}" for name, value in facts.items())
    (run / "report.png").write_bytes(stages_figures.summary(whole, line, list(map(_card, whole.stages)), asked))
    (run / "report.html").write_text("\n".join(_page(whole, facts, asked)), encoding="utf-8")
    print(f"{run / 'report.html'}\n{run / 'report.png'}")


def _facts(whole: Whole) -> dict[str, str]:
    planned = sum(stage.train.steps for stage in whole.recipe.stages)
    goodput = whole.goodput()
    restarts = len(goodput.starts) - len(whole.stages) if goodput else 0
    survived = {"goodput": f"{goodput.share:.0%}", "restarts": str(restarts)} if goodput else {}
    return {
        "stages": f"{len(whole.stages)} of {len(whole.recipe.stages)}",
        **report.describe(whole.history),
        "steps": f"{len(whole.history.rows):,} of {planned:,}",
        **survived,
    }


def _asked(whole: Whole) -> list[Asked]:
    """The examples of the first evaluation that shows pictures and has any, each with what every stage answered."""
    for name in whole.evaluations():
        results = [stage.history.evaluations.get(name) for stage in whole.stages]
        if any(result and seen(result) != "shown" for result in results):
            continue
        answers = [
            {(one["sample"], one["prompt"]): one["answer"] for one in result["examples"]} if result else {}
            for result in results
        ]
        latest: list[dict[str, Any]] = next((result["examples"] for result in reversed(results) if result), [])
        if latest:
            keys = [(one["sample"], one["prompt"]) for one in latest[:EXAMPLES]]
            return [Asked(one, [given.get(key) for given in answers]) for one, key in zip(latest, keys, strict=False)]
    return []


def _rate(stage: Stage) -> str:
    settings = stage.recipe.optimizer
    own = "".join(f", {module.name} {module.lr:g}" for module in settings.modules)
    return f"{settings.lr:g} → {settings.min_lr:g}{own}"


def _frozen(stage: Stage) -> str:
    return ", ".join(stage.recipe.train.frozen) or "nothing"


def _sees(stage: Stage) -> str:
    model = stage.recipe.model
    sides = ", ".join(f"{side} × {side}" for side in model.image_sizes)
    return f"{sides} pixels, {model.image_tokens} tokens each" if sides else "none"


def _mixture(stage: Stage) -> str:
    return Path(stage.recipe.data.mixture).name.removesuffix(".toml")


def _card(stage: Stage) -> list[str]:
    """Its name, and three lines that say what it is."""
    trained = f"frozen: {_frozen(stage)}" if stage.recipe.train.frozen else "nothing is frozen"
    steps = f"{len(stage.history.rows):,} steps, rate {_rate(stage)}, {_mixture(stage)}"
    return [stage.name, steps, f"{trained} ({stage.trained / 1e6:.2f} M parameters trained)", f"images: {_sees(stage)}"]


def _page(whole: Whole, facts: dict[str, str], asked: list[Asked]) -> Iterator[str]:
    yield from opening(whole.recipe.name, whole.recipe.description, facts)
    yield "<h2>Stages</h2>"
    yield '<p class="muted">Each begins with the weights of the one before. Bold is what it changes.'
    yield " Parameters that nothing reads, as a ViT's blocks behind the chosen layer, are never trained.</p>"
    yield from stage_table([stage.name for stage in whole.stages], _settings(whole))
    yield '<h2>Curves</h2>\n<div class="panels">'
    yield from (drawing(*panel) for panel in _panels(whole))
    yield "</div>"
    yield from _held_out(whole)
    for name in whole.evaluations():
        yield from _accuracy(whole, name)
    # Of the last stage that was asked both ways; each stage's own page has its own.
    asked_twice = [stage for stage in whole.stages if stage.history.vision()][-1:]
    for stage in asked_twice:
        for name, on, off in stage.history.vision():
            yield from report.vision(f"{name}, {stage.name}", on, off, stage.history)
    yield "<h2>The same questions, stage by stage</h2>"
    yield '<p class="muted">Of each task in turn the first question about a picture not yet shown; none is chosen.</p>'
    yield '<div class="examples">'
    names = [stage.name for stage in whole.stages]
    yield from (_example(one, names) for one in asked)
    yield "</div>"
    yield from _goodput(whole)
    yield "<h2>Skipped samples</h2>"
    yield from _skipped(whole)
    yield f"<h2>Recipe</h2>\n<pre>{html.escape(dump_recipe(whole.recipe))}</pre>\n</body>\n</html>"


def _settings(whole: Whole) -> dict[str, list[str]]:
    """What each stage is, and then what it took; a setting that differs from the stage before is bold."""
    settings: dict[str, Callable[[Stage], str]] = {
        "frozen": _frozen,
        "trained parameters": lambda stage: f"{stage.trained:,} of {stage.parameters:,}",
        "learning rate": _rate,
        "warm-up": lambda stage: f"{stage.recipe.optimizer.warmup_steps} steps",
        "images": _sees,
        "mixture": _mixture,
        "a step": lambda stage: (
            f"{stage.recipe.train.global_batch} packs of {stage.recipe.data.sequence_length} tokens"
        ),
    }
    took: dict[str, Callable[[Stage], str]] = {
        "steps": lambda stage: f"{len(stage.history.rows):,} of {stage.recipe.train.steps:,}",
        "samples": lambda stage: f"{int(stage.history.column('samples').sum()):,}",
        "tokens": lambda stage: f"{stage.history.column('tokens').sum() / 1e6:,.2f} M",
        "in training": lambda stage: "{} min {:02d} s".format(*divmod(round(_seconds(stage.history)), 60)),
        "tokens/s": lambda stage: f"{stage.history.column('tokens').sum() / _seconds(stage.history):,.0f}",
    }
    rows = {}
    for name, say in {**settings, **took}.items():
        texts = [say(stage) for stage in whole.stages]
        rows[name] = [
            f"<b>{html.escape(text)}</b>" if name in settings and number and text != texts[number - 1] else
            html.escape(text) for number, text in enumerate(texts)
        ]  # fmt: skip
    return rows


def _seconds(history: History) -> float:
    return float(history.column("seconds").sum())


def _panels(whole: Whole) -> Iterator[tuple[str, str, bytes]]:
    """Every drawing: its kind, what it is called, and itself."""
    run, routed = whole.history, whole.history.recipe.model.moe is not None

    def made(draw: Callable[[Axes, History], None], size: tuple[float, float]) -> tuple[str, str, bytes]:
        return "half" if size == _HALF else "wide", draw.__name__, figures.svg(draw, run, *size)

    def draw_held_out(axes: Axes, _: History) -> None:
        stages_figures.draw_held_out(axes, whole)

    yield made(figures.draw_loss, _WIDE)
    yield made(draw_held_out, _WIDE)
    if routed:
        yield made(figures.draw_active, _HALF)
        yield made(figures.draw_zero_share, _HALF)
        yield made(figures.draw_load, _WIDE)
        yield made(figures.draw_busiest, _HALF)
    yield made(figures.draw_gradient, _HALF)
    yield made(figures.draw_rate, _HALF)
    yield made(stages_figures.draw_speed, _HALF if routed else _WIDE)
    shown = [name for name in whole.evaluations() if any(
        seen(stage.history.evaluations[name]) == "shown" for stage in whole.stages if name in stage.history.evaluations
    )]  # fmt: skip
    for name in shown:

        def draw_accuracy(axes: Axes, _: History, name: str = name) -> None:
            stages_figures.draw_accuracy(axes, whole, name)

        yield made(draw_accuracy, _WIDE)


def _held_out(whole: Whole) -> Iterator[str]:
    names = whole.losses()
    if not names:
        return
    yield "<h2>Held-out loss, nats per token</h2>"
    yield (
        '<p class="muted">At the beginning of a stage: of the weights handed over to it, in its own model. A stage that'
        " changes nothing of the model begins exactly where the one before ended.</p>"
    )
    rows = {}
    for name in names:
        label = stages_figures.label(name)
        rows[f"{label}, begins"] = [_begins(stage.start(name), stage.before) for stage in whole.stages]
        rows[f"{label}, ends"] = [_cell(stage.history.losses.get(name)) for stage in whole.stages]
    blanks = sorted({name for stage in whole.stages for name in stage.history.losses} - set(names))
    for name in blanks:
        results = [stage.history.losses.get(name) for stage in whole.stages]
        told = next(TOLD[seen(result)] for result in results if result)
        rows[f"{stages_figures.label(name)} ({told}), ends"] = list(map(_cell, results))
    yield from stage_table([stage.name for stage in whole.stages], rows)


def _cell(result: dict[str, Any] | None) -> str:
    """A loss over the number of its tokens."""
    return f"<b>{result['loss']:.4f}</b> <small>{result['tokens']:,} tokens</small>" if result else "–"


def _begins(start: Start | None, before: Stage | None) -> str:
    if start is None:
        return "–"
    note = "first weights" if start.first else ""
    if before and start.ended is not None:
        exactly = "exactly that at" if start.measured else "not measured; that at"
        changed = start.loss - start.ended
        note = f"{f'{changed:+.4f} against' if changed else exactly} {before.name}'s end"
    return f"{start.loss:.4f} <small>{html.escape(note, quote=False)}</small>"


def _accuracy(whole: Whole, name: str) -> Iterator[str]:
    results = [stage.history.evaluations.get(name) for stage in whole.stages]
    some = next(result for result in results if result)
    told = TOLD[seen(some)]
    yield f"<h2>Accuracy on {html.escape(f'{name} ({told})' if told else name)}</h2>"
    tasks = sorted({task for result in results if result for task in result["tasks"]})
    rows = {score.replace("_", " "): [_share(result.get(score) if result else None) for result in results]
            for score in _SCORES if score in some}  # fmt: skip
    for task in tasks:
        found = [result["tasks"].get(task) if result else None for result in results]
        row = next(row for row in found if row)
        about = (
            f"{task.replace('_', ' / ')}, n {row['n']:,}, chance {row['chance']:.0%}, majority {row['majority']:.0%}"
        )
        rows[about] = [_share(row["accuracy"] if row else None, row) for row in found]
    yield from stage_table([stage.name for stage in whole.stages], rows)


def _share(share: float | None, row: dict[str, Any] | None = None) -> str:
    """An accuracy with its 95% interval, where there is one."""
    if share is None:
        return "–"
    return f"<b>{share:.1%}</b>" + (f" <small>{row['low']:.1%} – {row['high']:.1%}</small>" if row else "")


def _example(asked: Asked, names: list[str]) -> str:
    one = asked.example
    lines = []
    for name, given in zip(names, asked.answers, strict=True):
        if given is not None:
            kind = "right" if given == one["truth"] else "wrong"
            said = html.escape(given.strip())
            lines.append(f'<span><b>{html.escape(name)}</b><i class="{kind}">{said}</i></span>')
    if any(given not in (None, one["truth"]) for given in asked.answers):
        lines.append(f"<span><b>it is</b>{html.escape(one['truth'].strip())}</span>")
    return (
        f'<figure><img alt="{html.escape(one["sample"])}" src="data:image/png;base64,{one["png"]}">'
        f'<figcaption><span class="muted">{html.escape(one["prompt"])}</span>{"".join(lines)}</figcaption></figure>'
    )


def _goodput(whole: Whole) -> Iterator[str]:
    parts = [stage.history.goodput for stage in whole.stages]
    if not any(parts):
        return
    yield "<h2>Starts and goodput</h2>"
    rows: dict[str, list[str]] = {}
    for part in parts:
        cells = ["–"] * 7
        if part:
            rest = max(part.wall - part.steps - part.lost - part.checkpoints, 0.0)
            seconds = (part.wall, part.steps, part.lost, part.checkpoints, rest)
            cells = [f"{part.share:.1%}", *(f"{value:,.1f} s" for value in seconds)]
            cells.append("; ".join(f"after step {s.step:,} on {s.ranks} rank(s)" for s in part.starts))
        names = (
            "goodput", "from the first start", "in steps that count", "in steps done again",
            "standing still for checkpoints", "starting, or not running", "starts",
        )  # fmt: skip
        for name, cell in zip(names, cells, strict=True):
            rows.setdefault(name, []).append(html.escape(cell))
    yield from stage_table([stage.name for stage in whole.stages], rows)


def _skipped(whole: Whole) -> Iterator[str]:
    results = [
        result
        for stage in whole.stages
        for named in (stage.history.evaluations, stage.history.losses, stage.begin)
        for result in named.values()
    ]
    asked = sorted({reason for result in results for reason in result["skipped"]})
    for where, reasons in (("In training", whole.history.skipped), ("In evaluation", asked)):
        yield f"<p>{where}: {len(reasons) or 'none'}.</p>"
        yield f"<ul>{''.join(f'<li>{html.escape(reason)}</li>' for reason in reasons)}</ul>" if reasons else ""
