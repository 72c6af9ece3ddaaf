"""``mmoe bench ablations``: choices of LongCat-Flash at equal compute, three seeds each, on the quickstart's data.

Every run is a `mmoe train` of its own under build/ablations, so that a broken-off study goes on where it stopped. What
is compared is the mean loss of the last tenth of the steps: the stream of samples does not repeat, so these are losses
on samples that the model has not seen. Written whatever they show: docs/ablations.md and docs/ablations.png.
"""

import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from mmoe.errors import UserError
from mmoe.evaluate.figures import AMBER, BLUE, GREEN, STYLE, smooth
from mmoe.recipe import dump_recipe, load_recipe

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "ablations"
SEEDS = (0, 1, 2)
T_95 = {3: 4.303}
"""Student's t for a two-sided 95% interval of the mean of so many runs."""
HEADER = "| | final loss | by seed | FFN experts a token |"
COMMON = ("train.global_batch=8", "parallel.expert=1")
COLORS = (BLUE, AMBER, GREEN)


@dataclass(frozen=True)
class Arm:
    """One side of a study: what it sets in the recipe."""

    name: str
    settings: tuple[str, ...]
    rate: float = 0.0
    """The learning rate, where the study sweeps it."""


@dataclass(frozen=True)
class Study:
    title: str
    question: str
    arms: tuple[Arm, ...]
    steps: int
    settings: tuple[str, ...] = ()
    """Common to its arms."""

    @property
    def sweeps(self) -> bool:
        return any(arm.rate for arm in self.arms)


def _sweep() -> Iterator[Arm]:
    for name, settings in (
        ("32 wide", ("model.backbone.hidden_size=32",)),
        ("128 wide, transferred", ("model.backbone.hidden_size=128", "transfer.base_width=32")),
        ("128 wide, as it is", ("model.backbone.hidden_size=128",)),
    ):
        for rate in (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2):
            yield Arm(name, (*settings, f"optimizer.lr={rate}", f"optimizer.min_lr={rate / 20}"), rate)


STUDIES = {
    "zero_experts": Study(
        "Zero experts",
        "Do 3 slots over 8 FFN and 4 zero experts, steered to 2 FFN experts a token, beat always 2 of 8? "
        "The gates of a token add up to 0.75 at the start in both (3 of 12 and 2 of 8 shares of a softmax, times 3).",
        (
            Arm("zero experts, K_e = 2 of 3", ("model.moe.top_k=3", "model.moe.zero_experts=4")),
            Arm("plain top-2", ("model.moe.top_k=2", "model.moe.zero_experts=0")),
        ),
        300,
        ("model.moe.active_experts=2.0",),
    ),
    "order": Study(
        "Shortcut",
        "Does the shortcut (ScMoE), which lets communication hide, cost anything against the ordinary order?",
        (
            Arm("shortcut", ("model.moe.order=shortcut",)),
            Arm("ordinary order", ("model.moe.order=sequential",)),
        ),
        300,
    ),
    "transfer": Study(
        "Transfer of the learning rate",
        "Is the best learning rate of a narrow proxy the best of a model four times as wide?",
        tuple(_sweep()),
        200,
    ),
}


@dataclass(frozen=True)
class Result:
    arm: Arm
    finals: list[float]
    """By seed."""
    curves: list[list[float]] = field(repr=False)
    active: float
    """FFN experts a token, mean of the runs."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.finals)


def interval(values: list[float]) -> str:
    """The mean and, of several, half the width of its 95% interval."""
    mean, n = statistics.fmean(values), len(values)
    if not math.isfinite(mean):
        return "diverged"
    return f"{mean:.4f}" + (f" ± {T_95[n] * statistics.stdev(values) / math.sqrt(n):.4f}" if n > 1 else "")


def _records(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _train(study: str, index: int, seed: int, steps: int, data: str) -> list[dict]:
    """The steps' records of one run, made where they are not there yet, on one thread. A run that diverges ends early,
    its last loss None.

    Raises:
        UserError: it failed otherwise.
    """
    arm = STUDIES[study].arms[index]
    length = (f"train.steps={steps}", f"optimizer.warmup_steps={steps // 10}", f"checkpoint.every={steps}")
    common = (*length, *COMMON, f"train.seed={seed}", f"data.root={data}", *STUDIES[study].settings)
    settings = [*common, *arm.settings]
    resolved = dump_recipe(load_recipe("quickstart", settings))
    # The run of another recipe lies elsewhere: it is never taken for this one.
    key = hashlib.sha256(resolved.encode()).hexdigest()[:8]
    folder = BUILD / f"{study}-{steps}" / f"{index:02d}-seed{seed}-{key}"
    records = _records(folder)
    if len(records) < steps and not _diverged(records):
        command = [sys.executable, "-m", "mmoe", "train", "quickstart", "--out", str(folder), "--resume"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*command, "--set", *settings], env=environment, capture_output=True, text=True, cwd=ROOT, check=False
        )
        records = _records(folder)
        if done.returncode and not _diverged(records):
            said = " ".join(done.stderr.strip().splitlines()[-1:])
            raise UserError(f"a run failed: {said}", f"{study}, {arm.name}, seed {seed}", f"see {folder}")
    return records


def _diverged(records: list[dict]) -> bool:
    return bool(records) and records[-1]["loss"] is None


def _curve(records: list[dict], steps: int) -> list[float]:
    """The losses; not a number where there is none."""
    losses = [math.nan if step["loss"] is None else step["loss"] for step in records]
    return losses + [math.nan] * (steps - len(losses))


def _study(name: str, seeds: tuple[int, ...], steps: int, data: str, threads: int, console: Console) -> list[Result]:
    arms = STUDIES[name].arms
    jobs = [(index, seed) for seed in seeds for index in range(len(arms))]
    with ThreadPoolExecutor(threads) as pool:
        runs = [pool.submit(_train, name, index, seed, steps, data) for index, seed in jobs]
        try:
            waiting = track(runs, description=STUDIES[name].title, console=console)
            records = dict(zip(jobs, [run.result() for run in waiting], strict=True))
        except UserError:
            pool.shutdown(cancel_futures=True)
            raise
    last, results = max(1, steps // 10), []
    for index, arm in enumerate(arms):
        mine = [records[index, seed] for seed in seeds]
        curves = [_curve(run, steps) for run in mine]
        active = statistics.fmean(step["active_experts_mean"] for run in mine for step in run)
        finals = [statistics.fmean(curve[-last:]) for curve in curves]
        results.append(Result(arm, [x if math.isfinite(x) else math.inf for x in finals], curves, active))
    return results


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


def _draw(found: dict[str, list[Result]], path: Path) -> None:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(found), 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (name, results) in zip(np.atleast_1d(figure.subplots(1, len(found))), found.items(), strict=True):
            (_draw_sweep if STUDIES[name].sweeps else _draw_curves)(axes, results)
            axes.set_title(STUDIES[name].title)
            axes.legend()
        figure.savefig(path, dpi=110)


def _page(found: dict[str, list[Result]], seeds: tuple[int, ...]) -> str:
    lines = [
        "# Ablations",
        "",
        "Written by `mmoe bench ablations`: the quickstart's model and data, 8 packs a step, "
        f"seeds {', '.join(map(str, seeds))}. Final loss: the mean over the last tenth of the steps, on samples not "
        "seen before; ± is half the 95% interval of the mean over seeds.",
        "",
        "![ablations](ablations.png)",
    ]
    for name, results in found.items():
        study = STUDIES[name]
        question = f"{study.question} {len(results[0].curves[0])} steps."
        lines += ["", f"## {study.title}", "", question, "", HEADER, "|---|---|---|---|"]
        for result in results:
            label = f"{result.arm.name}, {result.arm.rate:g}" if study.sweeps else result.arm.name
            by_seed = ", ".join(f"{loss:.4f}" for loss in result.finals)
            lines.append(f"| {label} | {interval(result.finals)} | {by_seed} | {result.active:.2f} |")
        lines += ["", *_conclusions(study, results)]
    return "\n".join(lines) + "\n"


def _conclusions(study: Study, results: list[Result]) -> Iterator[str]:
    if study.sweeps:
        for name in dict.fromkeys(result.arm.name for result in results):
            best = min((result for result in results if result.arm.name == name), key=lambda result: result.mean)
            rates = [result.arm.rate for result in results if result.arm.name == name]
            edge = ", at the edge of the grid" if best.arm.rate in (min(rates), max(rates)) else ""
            yield f"- {name}: best at {best.arm.rate:g}{edge}, {interval(best.finals)}"
    else:
        first, second = results
        differences = [b - a for a, b in zip(first.finals, second.finals, strict=True)]
        yield f"{second.arm.name} minus {first.arm.name}, the same seeds: {interval(differences)}"


def run(options: Namespace) -> None:
    """The command; ``options`` as ``mmoe bench`` reads them: --only names studies, --quick runs each briefly once.

    Raises:
        UserError: an option of another suite, an unknown study, part of the studies for the page of all, or a run that
            failed.
    """
    console = Console(width=160, soft_wrap=True)
    for given, option in (
        (options.json, "--json"),
        (options.skip, "--skip"),
        (options.shape != "*", "--shape"),
        (options.emulated, "--emulated"),
        (options.device != "cpu", "--device"),
        (options.sweep, "--sweep"),
        (options.profile, "--profile"),
    ):
        if given:
            raise UserError("is not for `mmoe bench ablations`", option, "leave it out")
    if (options.quick or options.only or options.steps) and options.out == Path("docs"):
        raise UserError("docs/ablations.md is of all studies in full", "--out", "name another folder")
    if options.steps is not None and options.steps < 10:
        raise UserError(f"{options.steps} steps are too few to warm up in", "--steps", "give at least 10")
    names = options.only or list(STUDIES)
    for name in names:
        if name not in STUDIES:
            raise UserError(f"there is no {name!r}", "--only", f"choose from {', '.join(STUDIES)}")
    seeds = SEEDS[:1] if options.quick else SEEDS
    lengths = {name: 4 if options.quick else options.steps or STUDIES[name].steps for name in names}
    data = str(Path(options.data).resolve())
    found = {name: _study(name, seeds, lengths[name], data, options.threads, console) for name in names}
    options.out.mkdir(parents=True, exist_ok=True)
    _draw(found, options.out / "ablations.png")
    page = _page(found, seeds)
    (options.out / "ablations.md").write_text(page)
    console.print(page, highlight=False, markup=False)
