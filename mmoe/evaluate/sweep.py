"""`mmoe sweep`: a recipe's model with each of several sets of its encoders, trained, asked and compared.

DIR/SET.toml is the recipe with the encoders of SET alone, DIR/SET its run; what was found is in DIR/sweep.md,
sweep.json and sweep.png (:mod:`mmoe.evaluate.sweep_page`). After Cambrian-1's study of vision encoders
(arXiv 2406.16860, section 2).
"""

import argparse
import contextlib
import dataclasses
import itertools
import os
import shlex
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmoe.ending import say
from mmoe.errors import UserError
from mmoe.recipe import dump_recipe, load_recipe
from mmoe.recipe.checks import problems
from mmoe.recipe.schema import Recipe

if TYPE_CHECKING:
    from mmoe.evaluate.runs import Runner

ALL = "all"
MOST = 4
"""Encoders whose every subset is tried: 15 runs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All but --set."""
    parser.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name or the path of a .toml file")
    text = "where the runs and what was found are written; goes on there where it was broken off"
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=text)
    text = f"names of the recipe's encoders joined by +; {ALL}: every subset, of {MOST} encoders at most"
    parser.add_argument("--encoders", nargs="+", required=True, metavar="SET", help=text)
    text = "prepared data sets, or folders of CV-Bench's files, whose questions each trained model is asked"
    parser.add_argument("--data", action="extend", nargs="+", default=[], type=Path, metavar="PATH", help=text)
    text = "what trains in the place of `mmoe`, for example 'launch/torchrun.sh 2'"
    parser.add_argument("--launch", default="", metavar="COMMAND", help=text)
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="runs at a time (default: 1)")


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run to be."""

    name: str
    """The set as the command line has it: vit+convnet."""
    recipe: Recipe
    folder: Path

    @property
    def encoders(self) -> list[str]:
        return [encoder.name for encoder in self.recipe.model.encoders]

    @property
    def file(self) -> Path:
        """Its recipe."""
        return self.folder.with_name(f"{self.name}.toml")

    @property
    def last(self) -> Recipe:
        """What is trained last: the last stage, or the recipe itself where it has none."""
        return self.recipe.stages[-1] if self.recipe.stages else self.recipe


def only(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """``recipe``, and its stages, with these encoders alone; what else it says of others goes."""

    def stays(module: str) -> bool:
        parts = module.split(".")
        return parts[0] != "encoders" or len(parts) == 1 or parts[1] in names

    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(
            recipe.model, encoders=tuple(encoder for encoder in recipe.model.encoders if encoder.name in names)
        ),
        train=dataclasses.replace(recipe.train, frozen=tuple(filter(stays, recipe.train.frozen))),
        optimizer=dataclasses.replace(
            recipe.optimizer, modules=tuple(module for module in recipe.optimizer.modules if stays(module.name))
        ),
        stages=tuple(only(stage, names) for stage in recipe.stages),
    )


def plan(recipe: Recipe, asked: Sequence[str], out: Path) -> list[Planned]:
    """A run for each set that is asked for, each once; the encoders of a set are in the recipe's order.

    Raises:
        UserError: a set names what the recipe has not, or its recipe is none that can be trained.
    """
    known = [encoder.name for encoder in recipe.model.encoders]
    if ALL in asked and len(known) > MOST:
        what = f"{recipe.name} has {len(known)} encoders, {2 ** len(known) - 1} sets of them"
        raise UserError(what, f"--encoders {ALL}", "name the sets")
    every = itertools.chain.from_iterable(itertools.combinations(known, count + 1) for count in range(len(known)))
    wanted: dict[tuple[str, ...], None] = {}
    for text in asked:
        parts = text.split("+")
        for name in parts if text != ALL else ():
            if name not in known:
                fix = f"the recipe's encoders are {', '.join(known)}" if known else "the recipe has no encoders"
                raise UserError(f"set {text!r}: there is no encoder {name!r}", "--encoders", fix)
        wanted |= dict.fromkeys(every if text == ALL else [tuple(name for name in known if name in parts)])
    return [_planned(recipe, names, out) for names in wanted]


def _planned(recipe: Recipe, names: tuple[str, ...], out: Path) -> Planned:
    name, mine = "+".join(names), only(recipe, names)
    if Path(name).name != name:
        raise UserError(f"set {name!r} is no name of a folder", "--encoders", "rename the encoder")
    for part in (mine, *mine.stages):
        for key, what, fix in problems(part, staged=bool(part.stages)):
            stage = "" if part is mine else f"{part.name}, "
            raise UserError(f"set {name!r} cannot be trained: {key}: {what}", f"{stage}--encoders {name}", fix)
    return Planned(name, mine, out / name)


def run(options: argparse.Namespace) -> None:
    """The command.

    Raises:
        UserError: what is asked for cannot be, found before anything is trained; or runs failed, once the others are
            done and told.
        Interrupted: SIGTERM or SIGINT came; the runs under way have saved.
    """
    from mmoe.evaluate.runs import Runner

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a sweep starts its own processes", "", "run it alone, and give the launcher as --launch")
    if options.parallel < 1:
        raise UserError(f"{options.parallel} runs at a time", "--parallel", "give at least 1")
    launch = shlex.split(options.launch)
    cores = len(os.sched_getaffinity(0))
    divided = not launch and options.parallel > 1 and "OMP_NUM_THREADS" not in os.environ
    runner = Runner(max(1, cores // options.parallel) if divided else None, launch)
    recipe = load_recipe(options.recipe, options.set)
    sweep(recipe, options.encoders, options.out, options.data, runner, options.parallel, ranks=0 if launch else 1)


def sweep(
    recipe: Recipe,
    asked: Sequence[str],
    out: Path,
    data: Sequence[Path],
    runner: "Runner",
    parallel: int = 1,
    ranks: int = 1,
) -> None:
    """:func:`run` with a runner; ``ranks``: of each run, where that is known, else 0."""
    from mmoe.evaluate import sweep_page

    planned = plan(recipe, asked, out)
    labels(data)
    _refuse(planned, data, ranks)
    out.mkdir(parents=True, exist_ok=True)
    for one in planned:
        one.file.write_text(dump_recipe(one.recipe))
    rows: list[dict[str, Any]] = []
    with _stopping(runner), ThreadPoolExecutor(parallel) as pool:
        futures = [pool.submit(_row, one, data, runner) for one in planned]
        try:
            for number, future in enumerate(futures, 1):
                rows.append(future.result())
                say(f"{number} of {len(planned)}: {sweep_page.line(rows[-1])}")
        except BaseException:
            runner.stop()
            raise
    print(sweep_page.write(out, recipe, rows))
    failed = [row["failed"] for row in rows if "failed" in row]
    if failed:
        others = f"; {len(failed)} of {len(rows)} sets failed, see {out}/sweep.md" if len(rows) > 1 else ""
        raise UserError(f"{failed[0]}{others}", "", "mend that and give the same command again")


def labels(data: Sequence[Path]) -> dict[str, Path]:
    """Each data set by the name of its folder, or, where two have the same, by as many of the folders above as set them
    apart: cv_bench-test.

    Raises:
        UserError: one is named twice.
    """
    paths = [path.resolve() for path in data]
    if len({*paths}) < len(paths):
        raise UserError("a data set is named twice", f"--data {' '.join(map(str, data))}", "leave one out")
    for count in range(1, max((len(path.parts) for path in paths), default=1)):
        names = ["-".join(path.parts[1:][-count:]) for path in paths]
        if len({*names}) == len(names):
            return dict(zip(names, data, strict=True))
    return {f"{number}-{path.name}": given for number, (path, given) in enumerate(zip(paths, data, strict=True), 1)}


def _refuse(planned: Sequence[Planned], data: Sequence[Path], ranks: int) -> None:
    """Raises :class:`UserError` for what would fail only once something is trained."""
    from mmoe.data import cv_bench
    from mmoe.data.source import Source, name_of
    from mmoe.evaluate import scenes
    from mmoe.models.count import vision_modules
    from mmoe.parallel import layout
    from mmoe.train import run, stages

    for path in data:
        if cv_bench.files(path):
            cv_bench.read(path)
            continue
        with contextlib.closing(Source(path, name_of(path))) as source:
            if not scenes.asks(source):
                raise UserError("no sample asks a question with choices", str(path), "leave it out")
    for one in planned:
        try:
            for number, stage in enumerate(one.recipe.stages or [one.recipe]):
                here = stages.folder(one.recipe, number, one.folder) if one.recipe.stages else one.folder
                run.starting_point(stage, here, resume=True)
                if ranks:
                    layout.check(stage, ranks)
            vision_modules(one.last.model)
        except ValueError as error:
            raise UserError(f"set {one.name!r} cannot be built: {error}", "", "change the recipe") from None
        except UserError as error:
            raise UserError(f"set {one.name!r}: {error.what}", error.where, error.fix) from None


@contextlib.contextmanager
def _stopping(runner: "Runner") -> Iterator[None]:
    """SIGTERM and SIGINT end what ``runner`` has started, which saves."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: runner.stop()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _row(one: Planned, data: Sequence[Path], runner: "Runner") -> dict[str, Any]:
    """What sweep.json says of a set, trained and asked as far as it is not yet."""
    from mmoe.evaluate import sweep_page

    try:
        checkpoint, answers = _made(one, data, runner)
    except UserError as error:
        return {"set": one.name, "encoders": one.encoders, "failed": str(error)}
    return sweep_page.row(one.name, one.last, checkpoint.parents[1], answers)


def _made(one: Planned, data: Sequence[Path], runner: "Runner") -> tuple[Path, dict[str, Path]]:
    """The last checkpoint of a set, and its evaluations by the data set's name."""
    from mmoe.train import stages

    if stages.final(one.recipe, one.folder) is None:
        say(f"{one.name}: training in {one.folder}")
        runner.train(one.name, str(one.file), one.folder)
    checkpoint = stages.final(one.recipe, one.folder)
    if checkpoint is None:
        raise UserError("a run has ended early", one.name, f"see {one.folder}")
    answers = {}
    for split, path in labels(data).items():
        answers[split] = checkpoint.parents[1] / "evaluation" / f"{split}.json"
        runner.evaluate(one.name, checkpoint, path, answers[split])
    return checkpoint, answers
