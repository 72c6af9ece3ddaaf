"""Runs in processes of their own, one `mmoe` command each, and what their files say."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import mmoe
from mmoe.checkpoint.layout import MANIFEST
from mmoe.data import cv_bench
from mmoe.data.shards import INDEX
from mmoe.data.source import Source, name_of
from mmoe.ending import INTERRUPTED
from mmoe.errors import Interrupted, UserError
from mmoe.evaluate.asked import PLAIN, heading


class Runner:
    """Starts commands and waits for them; several threads may use one.

    Args:
        threads: of each process on the CPU; None: as the environment or the launcher has it.
        launch: what stands in the place of `mmoe` where a run is trained, for example ("launch/torchrun.sh", "2").
    """

    def __init__(self, threads: int | None = None, launch: Sequence[str] = ()) -> None:
        self.program = (sys.executable, "-m", "mmoe")
        self.launch = tuple(launch) or self.program
        # The processes run the code that this one does, wherever it lies.
        path = os.pathsep.join(filter(None, (str(Path(mmoe.__file__).parents[1]), os.environ.get("PYTHONPATH"))))
        ours = {"PYTHONPATH": path, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
        self.environment = {"PYTHON_BIN": sys.executable, **os.environ, **ours}
        self.processes: set[subprocess.Popen[str]] = set()
        self.stopped = False

    def train(self, name: str, recipe: str, out: Path, settings: Sequence[str] = ()) -> None:
        """`mmoe train RECIPE --out OUT --resume`; ``name`` is for messages.

        Raises:
            UserError: it failed; with the last line that it said, and its folder.
            Interrupted: it was stopped, and has saved.
        """
        command = [*self.launch, "train", recipe, "--out", str(out), "--resume"]
        self._run([*command, *(["--set", *settings] if settings else [])], name, out)

    def evaluate(self, name: str, checkpoint: Path, data: Path, out: Path) -> None:
        """`mmoe evaluate CHECKPOINT --suite … --data DATA --json OUT`, by the suite that DATA is for, where OUT is not
        of them yet.

        Raises:
            UserError, Interrupted: as :meth:`train`.
        """
        if evaluation(out, checkpoint, data) is None:
            asked = ["--suite", suite_of(data), "--data", str(data), "--json", str(out)]
            self._run([*self.program, "evaluate", str(checkpoint), *asked], name, out.parent.parent)

    def stop(self) -> None:
        """Ends what runs as SIGTERM does, and starts nothing more."""
        self.stopped = True
        for process in tuple(self.processes):
            process.terminate()

    def _run(self, command: Sequence[str], name: str, folder: Path) -> None:
        if self.stopped:
            raise Interrupted(f"{name} was not started; go on with the same command")
        try:
            process = subprocess.Popen(
                command, env=self.environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
        except OSError as error:
            raise UserError(f"cannot be started: {error.strerror}", command[0], "name a launcher") from None
        with process:
            self.processes.add(process)
            if self.stopped:
                process.terminate()
            said = process.communicate()[1].strip().splitlines()
            self.processes.discard(process)
        if process.returncode == INTERRUPTED or (process.returncode and self.stopped):
            raise Interrupted(f"{name} was stopped; go on with the same command")
        if process.returncode:
            last = said[-1].removeprefix("mmoe: ") if said else f"exit status {process.returncode}"
            raise UserError(f"a run failed: {last}", name, f"see {folder}")


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, one a step."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def final_loss(losses: Sequence[float]) -> float:
    """The mean of the last tenth."""
    return statistics.fmean(losses[-max(1, len(losses) // 10) :])


def suite_of(data: Path) -> str:
    """Which suite asks the questions of a folder."""
    return "cv_bench" if cv_bench.files(data) else "scenes"


def evaluation(path: Path, checkpoint: Path, data: Path) -> dict[str, Any] | None:
    """What `mmoe evaluate CHECKPOINT --suite … --data DATA --json` wrote; None where it is not there, not whole,
    older than what it is of, or of something else: without the pictures, of a few samples, of another suite."""
    suite, sources = suite_of(data), [checkpoint / MANIFEST, *(cv_bench.files(data) or [data / INDEX])]
    wanted = heading(suite, checkpoint, data, PLAIN)
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if any(source.stat().st_mtime > path.stat().st_mtime for source in sources):
            return None
    except (OSError, ValueError):
        return None
    if suite == "cv_bench":
        wanted["samples"], _ = cv_bench.read(data)
    else:
        with closing(Source(data, name_of(data))) as source:
            wanted["samples"] = len(source)
    if not isinstance(result, dict) or result.get("system_prompt"):
        return None
    return result if all(result.get(name) == value for name, value in wanted.items()) else None


def mean_accuracy(tasks: Mapping[str, Mapping[str, Any]]) -> float:
    """Over the tasks of an evaluation, each counting the same."""
    return statistics.fmean(row["accuracy"] for row in tasks.values())
