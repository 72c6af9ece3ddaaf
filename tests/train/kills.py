"""The campaign of test_kill.py: thirty ways to kill a rank, drawn from seeds, and what became of each run."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sets
import training

STEPS, EVERY = 10, 4
SETTINGS = (
    f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "train.global_batch=8", "optimizer.lr=1e-3",
    "optimizer.min_lr=1e-4",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Rank ``victim`` of ``ranks`` is killed; the run goes on with ``then`` ranks."""

    seed: int
    kind: str
    """``start``: while the ranks start; ``step``: in a step; ``save``: while a checkpoint is written."""
    ranks: int
    then: int
    victim: int
    step: int
    """The step done before (``step``), or whose checkpoint is being written (``save``)."""
    delay: float
    """Seconds after that."""

    @property
    def name(self) -> str:
        after = f"{self.kind} {self.step}" if self.step else self.kind
        return f"{self.seed}: rank {self.victim} of {self.ranks}, {after}, then {self.then}"


def draw(seed: int) -> Case:
    chance = random.Random(seed)
    ranks, kind = (2, 4)[seed % 2], ("step", "save", "step", "save", "start")[seed % 5]
    step = {"start": 0, "step": chance.randrange(1, STEPS - 1), "save": chance.choice((EVERY, 2 * EVERY))}[kind]
    # A start takes seconds, a step and a save tenths of one.
    delay = chance.uniform(0, {"start": 8.0, "step": 0.2, "save": 0.1}[kind])
    then = chance.choice((1, 2, 4)) if seed % 3 == 0 else ranks
    return Case(seed, kind, ranks, then, chance.randrange(ranks), step, delay)


CASES = [draw(seed) for seed in range(30)]
OFTEN = (2, 4)
"""The seeds of `make test`: in a step and in a start, of two ranks."""


@dataclass(frozen=True)
class Killed:
    """What became of a run: the launcher's status, what it wrote, seconds from the kill to the launcher's end, what
    still ran then, the newest checkpoint's step and the steps done behind it."""

    status: int
    stderr: str
    seconds: float
    left: list[int]
    saved: int
    lost_steps: int


class Campaign:
    def __init__(self, root: Path) -> None:
        self.root = root
        sets.write_set(root, "varied", sets.varied(60))
        self.recipe = training.write_recipe(root, sets.write_mixture(root, varied=1.0))
        self._whole: dict[int, Path] = {}

    def _options(self, ranks: int) -> list[str]:
        return ["--set", *SETTINGS, f"parallel.expert={min(ranks, 2)}"]

    def _run(self, out: Path, *options: str, ranks: int) -> None:
        done = training.run(self.recipe, out, *options, *self._options(ranks), ranks=ranks)
        assert done.returncode == 0, done.stderr

    def whole(self, ranks: int) -> Path:
        """The run that nobody kills."""
        if ranks not in self._whole:
            self._whole[ranks] = self.root / f"whole-{ranks}"
            self._run(self._whole[ranks], ranks=ranks)
        return self._whole[ranks]

    def folder(self, case: Case) -> Path:
        return self.root / f"killed-{case.seed}"

    def kill(self, case: Case) -> Killed:
        out = self.folder(case)
        process = subprocess.Popen(
            training.command(self.recipe, out, *self._options(case.ranks), ranks=case.ranks),
            env=training.environment(MMOE_RESTARTS="0"),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            self._wait(lambda: bool(_ranks(out, case.victim)), process)
            if case.kind == "step":
                metrics = out / "metrics.jsonl"
                self._wait(lambda: metrics.exists() and metrics.read_text().count("\n") >= case.step, process)
            elif case.kind == "save":
                folder, name = out / "checkpoints", f"step_{case.step:08d}"
                self._wait(lambda: any(folder.glob(f".{name}.*")) or (folder / name).exists(), process)
            time.sleep(case.delay)
            begin = time.monotonic()
            for pid in _ranks(out, case.victim):
                os.kill(pid, signal.SIGKILL)
            stderr = process.communicate(timeout=120)[1]
            seconds = time.monotonic() - begin
        except BaseException:
            for pid in (process.pid, *_ranks(out)):
                os.kill(pid, signal.SIGKILL)
            raise
        latest = out / "checkpoints" / "latest"
        saved = int(latest.read_text().strip().removeprefix("step_")) if latest.exists() else 0
        done = training.curve(out)[-1]["step"] if (out / "metrics.jsonl").exists() and training.curve(out) else 0
        return Killed(process.returncode, stderr, seconds, _ranks(out), saved, done - saved)

    @staticmethod
    def _wait(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
        until = time.monotonic() + 120
        while not condition():
            assert process.poll() is None, "the run ended before"
            assert time.monotonic() < until, "the run never got there"
            time.sleep(0.002)

    def resume(self, case: Case) -> list[dict]:
        """The curve once the run has gone on to its end."""
        self._run(self.folder(case), "--resume", ranks=case.then)
        return training.curve(self.folder(case))


def _ranks(out: Path, rank: int | None = None) -> list[int]:
    """Processes that train into ``out``; those of one rank."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended
        place = next((int(v[5:]) for v in variables if v.startswith(b"RANK=")), None)
        if str(out).encode() in command and place is not None and rank in (None, place):
            found.append(int(process.name))
    return found
