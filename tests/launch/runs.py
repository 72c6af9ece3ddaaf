"""The same run of four ranks for every launcher, what it is compared by, and the mpiruns of this machine."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import training

LAUNCH = training.ROOT / "launch"
STEPS = 40
ONE = ("--set", "train.micro_batch=1", f"train.steps={STEPS}", "checkpoint.every=10")
FOUR = (*ONE, "parallel.expert=2")
# Sums of gradients in another order; Adam's epsilon in the recipe keeps them from growing.
OTHER_ORDER = 2e-6
MPI = ("openmpi", "mpich")
MPI_EXTRA = "pip install 'mmoe[mpi]'"


def environment(**extra: str) -> dict[str, str]:
    """Without what a launcher around these tests may have set."""
    foreign = ("MMOE_", "SLURM_", "MASTER_", "NNODES", "NODE_RANK", "HOSTS", "LOCAL_")
    clean = {name: value for name, value in training.environment().items() if not name.startswith(foreign)}
    return clean | {"MMOE_BACKOFF": "0.5"} | extra


def command(launcher: str, ranks: int, recipe: Path, out: Path, *options: str) -> list[str]:
    return [str(LAUNCH / launcher), str(ranks), "train", str(recipe), "--out", str(out), *options]


def finish(process: "subprocess.Popen[str]", seconds: float = 300) -> str:
    """What a run that ended well has printed."""
    printed = process.communicate(timeout=seconds)[0]
    assert process.returncode == 0, printed
    return printed


def start(words: list[str], environment: dict[str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def difference(run: Path, other: Path) -> float:
    """0 where both curves are equal bit by bit, in every field but wall time; else the largest difference of losses."""
    ours, theirs = training.curve(run), training.curve(other)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, STEPS + 1))
    if ours == theirs:
        return 0.0
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=True))


def wait_for_checkpoint(run: Path, process: "subprocess.Popen[str] | None" = None, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not (run / "checkpoints" / "latest").exists():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"no checkpoint within {seconds:g} s"
        time.sleep(0.05)


def rank_process(run: Path, rank: int, variable: str = "RANK") -> psutil.Process:
    """The process of that rank, by the variable in which its launcher counts."""
    for process in psutil.process_iter():
        try:
            if str(run) in process.cmdline() and process.environ().get(variable) == str(rank):
                return process
        except psutil.Error:
            continue
    raise AssertionError(f"rank {rank} does not run")


def mpi(kind: str) -> dict[str, str]:
    """The variables that make launch/mpirun.sh take that MPI: the wheels that `make build` installs.

    Raises:
        LookupError: why there is none.
    """
    prefix = Path(sys.prefix) / ("mpich" if kind == "mpich" else "")
    mpirun = prefix / "bin" / "mpirun"
    if importlib.util.find_spec("mpi4py") is None:
        raise LookupError(f"no mpi4py: {MPI_EXTRA}")
    if not mpirun.exists():
        where = f"--prefix {prefix} --no-deps mpich" if kind == "mpich" else "openmpi"
        raise LookupError(f"no {mpirun}: make build, or pip install {where}")
    libraries = os.pathsep.join(filter(None, [str(prefix / "lib"), os.environ.get("LD_LIBRARY_PATH")]))
    return {"MPIRUN": str(mpirun), "LD_LIBRARY_PATH": libraries}
