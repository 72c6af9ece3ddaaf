"""``mmoe bench ablations``: choices of the model at equal steps, three seeds each, on the quickstart's data.

Every run is a `mmoe train` of its own under build/ablations, so that a broken-off study goes on where it stopped. What
is compared is the mean loss of the last tenth of the steps: the stream of samples does not repeat, so these are losses
on samples that the model has not seen. Written whatever they show: a section of docs/ablations.md and a figure for each
study, beside those that were written before.
"""

import hashlib
import math
import statistics
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track

from benchmarks.studies import page
from benchmarks.studies.arms import STUDIES
from benchmarks.studies.page import Result
from mmoe.checkpoint import layout
from mmoe.errors import UserError
from mmoe.evaluate import runs
from mmoe.models.count import vision_modules
from mmoe.recipe import dump_recipe, load_recipe

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "ablations"
SEEDS = (0, 1, 2)
COMMON = ("train.global_batch=8", "parallel.expert=1")


class Run(NamedTuple):
    records: list[dict]
    accuracy: dict[str, float]
    """By task; nothing where no questions are asked."""


def _train(study: str, index: int, seed: int, steps: int, data: str) -> Run:
    """One run, made where it is not there yet, on one thread. A run that diverges ends early, its last loss None.

    Raises:
        UserError: it failed otherwise.
    """
    arm, test = STUDIES[study].arms[index], STUDIES[study].test
    length = (f"train.steps={steps}", f"optimizer.warmup_steps={steps // 10}", f"checkpoint.every={steps}")
    common = (*length, *COMMON, f"train.seed={seed}", f"data.root={data}", *STUDIES[study].settings)
    settings = [*common, *arm.settings]
    resolved = dump_recipe(load_recipe("quickstart", settings))
    # The run of another recipe lies elsewhere: it is never taken for this one.
    key = hashlib.sha256(resolved.encode()).hexdigest()[:8]
    folder = BUILD / f"{study}-{steps}" / f"{index:02d}-seed{seed}-{key}"
    name, runner = f"{study}, {arm.name}, seed {seed}", runs.Runner(threads=1)
    records = runs.records(folder)
    if len(records) < steps and not _diverged(records):
        try:
            runner.train(name, "quickstart", folder, settings)
        except UserError:
            if not _diverged(runs.records(folder)):
                raise
        records = runs.records(folder)
    checkpoint = layout.newest(folder)
    if not test or checkpoint is None or _diverged(records):
        return Run(records, {})
    asked, answers = Path(data) / test, folder / "evaluation" / f"{Path(test).name}.json"
    runner.evaluate(name, checkpoint, asked, answers)
    result = runs.evaluation(answers, checkpoint, asked)
    assert result is not None
    return Run(records, {task: row["accuracy"] for task, row in result["tasks"].items()})


def _diverged(records: list[dict]) -> bool:
    return bool(records) and records[-1]["loss"] is None


def _curve(records: list[dict], steps: int) -> list[float]:
    """The losses; not a number where there is none."""
    losses = [math.nan if step["loss"] is None else step["loss"] for step in records]
    return losses + [math.nan] * (steps - len(losses))


def _study(name: str, seeds: tuple[int, ...], steps: int, data: str, parallel: int, console: Console) -> list[Result]:
    arms = STUDIES[name].arms
    jobs = [(index, seed) for seed in seeds for index in range(len(arms))]
    with ThreadPoolExecutor(parallel) as pool:
        futures = [pool.submit(_train, name, index, seed, steps, data) for index, seed in jobs]
        try:
            waiting = track(futures, description=STUDIES[name].title, console=console)
            done = dict(zip(jobs, [future.result() for future in waiting], strict=True))
        except UserError:
            pool.shutdown(cancel_futures=True)
            raise
    results = []
    for index, arm in enumerate(arms):
        mine = [done[index, seed] for seed in seeds]
        curves = [_curve(run.records, steps) for run in mine]
        finals = [loss if math.isfinite(loss) else math.inf for loss in map(runs.final_loss, curves)]
        active = statistics.fmean(step["active_experts_mean"] for run in mine for step in run.records)
        connector = vision_modules(load_recipe("quickstart", arm.settings).model)["connector"]
        count = sum(parameter.numel() for parameter in connector.parameters())
        tasks = sorted({task for run in mine for task in run.accuracy})
        accuracy = {task: [run.accuracy.get(task, math.inf) for run in mine] for task in tasks}
        results.append(Result(arm, finals, curves, active, count, accuracy))
    return results


def run(options: Namespace) -> None:
    """The command; ``options`` as ``mmoe bench`` reads them: --only names studies, --quick runs each briefly once.

    Raises:
        UserError: an unknown study, a short one for the page, or a run that failed.
    """
    console = Console(width=160, soft_wrap=True)
    if (options.quick or options.steps) and options.out == Path("docs"):
        raise UserError("docs/ablations.md is of studies in full", "--out", "name another folder")
    if options.steps is not None and options.steps < 10:
        raise UserError(f"{options.steps} steps are too few to warm up in", "--steps", "give at least 10")
    names = options.only or list(STUDIES)
    for name in names:
        if name not in STUDIES:
            raise UserError(f"there is no {name!r}", "--only", f"choose from {', '.join(STUDIES)}")
    seeds = SEEDS[:1] if options.quick else SEEDS
    lengths = {name: 4 if options.quick else options.steps or STUDIES[name].steps for name in names}
    data = str(Path(options.data).resolve())
    for name in names:
        results = _study(name, seeds, lengths[name], data, options.parallel, console)
        console.print(f"## {page.write(options.out, name, results, seeds)}\n", highlight=False, markup=False)
