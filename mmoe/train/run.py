"""A training run: a recipe and a folder in, checkpoints and metrics out; it can be interrupted and goes on exactly."""

import dataclasses
import errno
import fcntl
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from mmoe import preflight
from mmoe.checkpoint import layout as files
from mmoe.checkpoint.load import hand_over
from mmoe.checkpoint.load import resume as load_checkpoint
from mmoe.checkpoint.save import Saved, Saver
from mmoe.data.loader import Loader
from mmoe.data.tokenizer import load_tokenizer, same_tokens
from mmoe.ending import say
from mmoe.errors import Interrupted, RankLost, UserError
from mmoe.models.multimodal import build_stages
from mmoe.parallel import cpu_platform, engine, layout, watchdog
from mmoe.recipe.load import dump_recipe, load_recipe
from mmoe.recipe.schema import Recipe
from mmoe.train import encode
from mmoe.train.journal import Journal
from mmoe.train.metrics import Recorder, is_logged
from mmoe.train.schedule import batch_factor, bias_rate, learning_rate
from mmoe.train.step import Outcome, Stepper


def _neutral(recipe: Recipe) -> Recipe:
    """The recipe without what may change between a run and its continuation: none of it changes the curve."""
    # Where the data and the features lie does not matter: the loader compares what they hold.
    data = dataclasses.replace(recipe.data, root="", features="", workers=1, prefetch=1, max_bad_in_a_row=1)
    train = dataclasses.replace(recipe.train, log_every=1, max_skipped_in_a_row=1, stall_warning_seconds=1.0)
    # The distributed optimizer's state has a form of its own.
    parallel = type(recipe.parallel)(distributed_optimizer=recipe.parallel.distributed_optimizer)
    plain = {"parallel": parallel, "checkpoint": type(recipe.checkpoint)()}
    return dataclasses.replace(recipe, name="", description="", data=data, train=train, **plain)


def starting_point(recipe: Recipe, out: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from; refuses a folder that this run must not write into."""
    saved, newest = out / "recipe.toml", files.newest(out)
    if not saved.exists():
        if newest is not None:
            raise UserError(
                f"{out} holds a checkpoint, but no run that could go on", newest.name, "choose another --out"
            )
        return None
    old, new = _neutral(load_recipe(saved)), _neutral(recipe)
    if old != new:
        pairs = zip(dump_recipe(old).splitlines(), dump_recipe(new).splitlines(), strict=False)
        first = next((f"there `{a}`, here `{b}`" for a, b in pairs if a != b), "they differ")
        raise UserError(f"{out} holds another recipe's run: {first}", str(saved), "choose another --out")
    if newest is not None and not resume:
        raise UserError(
            f"{out} holds a run already", newest.name, "add --resume to go on with it, or choose another --out"
        )
    return newest


def _claim(out: Path) -> Any:
    """Locks the run's folder for this process; the lock goes with the file that is returned.

    Raises:
        UserError: the folder cannot be made, or another process writes into it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write the run: {error.strerror}", str(out), "choose another --out") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError("another process writes this run", str(out), "wait for it, or choose another --out") from None
    return file


def _fits(recipe: Recipe) -> None:
    """Raises :class:`UserError` where the tokenizer has more tokens than the model, or others for ``model.special``."""
    path = Path(recipe.data.root) / recipe.data.tokenizer
    size = load_tokenizer(path, recipe.model.special, images=recipe.model.image_tokens > 0).size
    if size > recipe.model.backbone.vocab_size:
        what = f"{path} has {size} tokens, the model only {recipe.model.backbone.vocab_size}"
        raise UserError(what, "model.backbone.vocab_size", f"set it to {size} or more")


def _tell_of_tokens(recipe: Recipe, initial: Path) -> None:
    """A warning where the checkpoint to begin with learned other tokens than the data are read as."""
    mine, theirs = Path(recipe.data.root) / recipe.data.tokenizer, initial / "tokenizer.json"
    try:
        if same_tokens(mine, theirs):
            return
        what = f"{theirs} reads texts as other tokens than {mine}: the weights know tokens that are none of the data's"
    except UserError as error:
        what = f"whether {theirs} reads texts as {mine} does is not known: {error.what}"
    say(f"mmoe: warning: {what}")


class _StopRequest:
    """Whether SIGTERM or SIGINT has come since :meth:`listen`; the step under way is finished first."""

    def __init__(self) -> None:
        self.asked = False
        self.before: dict[int, Any] = {}

    def listen(self) -> None:
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step
        self.asked = True

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class _Watch:
    """Hands batches through and remembers what was in them, for messages and pictures."""

    def __init__(self, loader: Loader, show: Any) -> None:
        self.loader, self.show = loader, show
        self.names: list[str] = []

    def __iter__(self) -> "_Watch":
        return self

    def __next__(self) -> dict[str, Any]:
        batch = next(self.loader)
        self.names += [name for pack in batch["samples"] for name in pack]
        self.show(batch)
        return batch


def _not_finite(step: int, row: int, outcome: Outcome, names: list[str]) -> UserError:
    """Names the samples of the micro-batches whose loss was not finite; all, where only the gradient was not."""
    parts = engine.gather((outcome.suspects, names))
    found = [name for suspects, _ in parts for name in suspects] or [name for _, part in parts for name in part]
    shown = list(dict.fromkeys(found))  # the ranks of a replica all read its samples
    return UserError(
        f"the loss was not finite for {row} steps in a row, the last one with samples {', '.join(shown[:8])}"
        f"{f' and {len(shown) - 8} more' if len(shown) > 8 else ''}",
        f"step {step}",
        "look at these samples, or start a new run with a lower optimizer.lr; the last checkpoint is untouched",
    )


def train(recipe: Recipe, out: Path, resume: bool = False, initial: Path | None = None) -> bool:
    """Trains ``recipe``, one without stages, into ``out`` on all ranks of the launch, from its newest checkpoint when
    ``resume``; from its first step with the weights of the checkpoint ``initial``, where that is given. Returns whether
    it was asked to stop, on any rank, when it was done.

    Raises:
        UserError: the layout does not fit the ranks, the data or the folder do not fit the recipe, the loss diverged.
        Interrupted: SIGTERM or SIGINT came; a checkpoint was saved.
        RankLost: another rank is gone, or ended by an error.
    """
    stop, journal = _StopRequest(), Journal(out, engine.announced()[0] == 0)
    try:
        with journal.until_the_end(), watchdog.guard(), _disk_trouble_told(out):
            return _train(recipe, out, resume, initial, stop, journal)
    finally:
        # After a loss the launcher's SIGTERM comes next: it must not end this process before it has said why it ends.
        if not isinstance(sys.exception(), RankLost):
            stop.restore()


@contextmanager
def _disk_trouble_told(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
            raise
        what = f"cannot write the run: {error.strerror}"
        raise UserError(what, str(error.filename or out), "make room or mend the disk, then --resume") from None


def _train(recipe: Recipe, out: Path, resume: bool, initial: Path | None, stop: _StopRequest, journal: Journal) -> bool:
    rank, world = engine.announced()
    layout.check(recipe, world)
    lock = _claim(out) if rank == 0 else None
    start = starting_point(recipe, out, resume) if rank == 0 else None
    engine.join(recipe.parallel, stall_warning_seconds=recipe.train.stall_warning_seconds)
    # Not before: who waits for the others to start has nothing to save.
    stop.listen()
    # Before the grid: ranks with different layouts would wait for each other in different groups.
    for warning in preflight.agree(recipe, out):
        if rank == 0:
            say(f"mmoe: warning: {warning}")
    here = engine.start(recipe.parallel, recipe.train.seed)
    start = engine.from_first(start)
    if source := start or initial:
        files.verify(source, rank, world)
    torch.use_deterministic_algorithms(True)
    # It would also write NaN into all memory that is only taken to be written: a pass over every result.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    models = build_stages(recipe)
    if start is None and initial is not None:
        hand_over(initial, models)
    stepper = Stepper(recipe, models)
    progress: dict[str, Any] = {"step": 0, "data": None, "taken": 0, "skipped_samples": 0}
    if start is not None:
        progress = load_checkpoint(start, stepper.wrapped, stepper.optimizer)
    _fits(recipe)
    if here.first and start is None and initial is not None:
        _tell_of_tokens(recipe, initial)
    features = encode.expected(recipe, models)
    loader = Loader(
        recipe.data,
        image_tokens=recipe.model.image_tokens,
        image_sizes=recipe.model.sizes_of(without=features),
        micro_batch=recipe.train.micro_batch,
        global_batch=recipe.train.global_batch,
        seed=recipe.train.seed,
        rank=here.data_rank,
        ranks=here.data_size,
        state=progress["data"],
        device="mixed" if cpu_platform.device().type == "cuda" else "cpu",
        features=features,
        special=recipe.model.special,
    )
    if here.first:
        (out / ".recipe.tmp").write_text(dump_recipe(recipe))
        (out / ".recipe.tmp").replace(out / "recipe.toml")
    recorder = Recorder(recipe, out, here.first, progress["step"])
    if resume and start is None:
        recorder.say(f"{out} holds no checkpoint: starting from the first step")
    hosts = list(dict.fromkeys(engine.gather(socket.gethostname())))
    # The gathering has come after the first rank trimmed the run's files: any rank may add to them now.
    with ExitStack() as closing:
        if lock:
            closing.callback(lock.close)
        closing.callback(loader.close)
        closing.callback(recorder.close)
        attempt = int(os.environ.get("MMOE_ATTEMPT", "0"))
        journal.start(step=progress["step"], ranks=world, hosts=hosts, attempt=attempt, **recorder.lost)
        _loop(recipe, out, stepper, loader, recorder, journal, stop, progress)
        return not engine.all_true(not stop.asked)


def _loop(
    recipe: Recipe,
    out: Path,
    stepper: Stepper,
    loader: Loader,
    recorder: Recorder,
    journal: Journal,
    stop: _StopRequest,
    progress: dict[str, Any],
) -> None:
    steps, tokenizer = recipe.train.steps, Path(recipe.data.root) / recipe.data.tokenizer
    if progress["step"] >= steps:
        recorder.say(f"{recipe.name}: complete, {steps} steps; see {out}")
        return
    saver = Saver(out, recipe, tokenizer)

    def tell(saved: list[Saved]) -> None:
        for one in saved:
            journal.add("checkpoint", step=one.step, stall=one.stall, seconds=one.seconds, bytes=one.bytes)
            recorder.saved(one.step, one.stall, one.seconds)

    skipped_in_a_row, factor = 0, batch_factor(recipe.optimizer, recipe.train.global_batch)
    while progress["step"] < steps:
        step, begin = progress["step"], time.perf_counter()
        first = step % recipe.checkpoint.every == 0

        def show(batch: dict[str, Any], step: int = step, first: bool = first) -> None:
            if first:
                recorder.pictures(step + 1, batch["images"], [name for pack in batch["samples"] for name in pack])
            if engine.ranks().has_batch:
                recorder.skipped(step + 1, batch["skipped"])

        watch = _Watch(loader, show)
        rate = factor * learning_rate(recipe.optimizer, step, steps)
        bias = bias_rate(recipe.model.moe, step, steps) if recipe.model.moe else None
        measure = is_logged(recipe.train, step + 1)
        outcome: Outcome = stepper.step(watch, rate, lambda: stop.asked, bias, measure)
        progress["step"] = journal.step = step + 1
        progress["skipped_samples"] += outcome.skipped_samples
        progress["taken"] += outcome.taken
        skipped_in_a_row = 0 if outcome.taken else skipped_in_a_row + 1
        if outcome.skipped_samples:
            recorder.say(
                f"step {step + 1}: {outcome.skipped_samples} bad sample(s) skipped, named in {out}/skipped.jsonl"
            )
        recorder.record(step + 1, outcome, rate, time.perf_counter() - begin)
        if not outcome.taken:
            recorder.say(
                f"step {step + 1}: loss {outcome.loss}, gradient norm {outcome.grad_norm}: skipped on all ranks"
            )
        done = step + 1 == steps
        if skipped_in_a_row >= recipe.train.max_skipped_in_a_row or (done and not progress["taken"]):
            tell(saver.finish())
            raise _not_finite(step + 1, skipped_in_a_row, outcome, watch.names)
        # Amid skipped steps nothing new is worth a checkpoint: the last good one stays the newest.
        due = (step + 1) % recipe.checkpoint.every == 0 and not skipped_in_a_row
        if done or outcome.interrupted or due:
            progress["data"] = loader.state()
            tell(saver.start(step + 1, stepper.wrapped, stepper.optimizer, progress))
        tell(saver.finish() if done or outcome.interrupted else saver.poll())
        if outcome.interrupted and not done:
            raise Interrupted(f"stopped after step {step + 1} of {steps}, saved; go on with --resume")
