"""launch/torchrun.sh: the ranks' exit statuses come through, and only their own words."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "torchrun.sh"

# In a folder of its own it is what `-m mmoe` finds first; what runs in it is the real cli.main with another command.
STAND_IN = """
import os, signal, sys, time

# Before the imports, which may take so much longer on one rank than on the other that it is told to end meanwhile.
rank, stopped = int(os.environ["RANK"]), []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: stopped.append(True))

sys.path.insert(0, {root!r})
from pathlib import Path
from mmoe import cli
from mmoe.errors import Interrupted, UserError

def wait_for_the_signal():
    Path(str(rank)).touch()
    while not stopped:
        time.sleep(0.02)

def run(options):
    {body}

cli._doctor = run
sys.exit(cli.main(["doctor"]))
"""


def launch(folder: Path, body: str, ranks: str = "2") -> "subprocess.Popen[str]":
    (folder / "mmoe.py").write_text(STAND_IN.format(root=str(ROOT), body=body))
    # The tests may themselves run under a launcher or with its variables set.
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}
    variables = clean | {"PYTHON_BIN": sys.executable, "PYTHONPATH": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([SCRIPT, ranks, "doctor"], cwd=folder, env=variables, text=True, **pipes)


@pytest.mark.parametrize(
    ("body", "status", "out", "err"),
    [
        ("print('fine', os.environ['WORLD_SIZE'])", 0, "fine 2\n", ""),
        ("raise UserError('no data', 'there', 'prepare it')", 2, "", "no data (there): prepare it\n"),
        ("if rank: raise UserError('no data')\n    wait_for_the_signal()", 2, "", "mmoe: rank 1: no data\n"),
        ("raise Interrupted('saved')", 75, "", "mmoe: saved\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 1, "", "was killed by SIGKILL and left no message\n"),
        ("os._exit(3)", 1, "", "ended with status 3 and left no message\n"),
    ],
)
def test_statuses_come_through(tmp_path: Path, body: str, status: int, out: str, err: str) -> None:
    process = launch(tmp_path, body)
    printed = process.communicate(timeout=120)
    assert (process.returncode, printed[0]) == (status, out)
    assert printed[1].endswith(err)
    assert len(printed[1].splitlines()) == len(err.splitlines())


def test_a_defect_shows_one_traceback(tmp_path: Path) -> None:
    process = launch(tmp_path, "if rank: raise ValueError('broken')\n    wait_for_the_signal()")
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert err.startswith("mmoe: rank 1: ValueError\n")
    assert err.count("Traceback") == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_rank_and_75_comes_back(tmp_path: Path, signum: signal.Signals) -> None:
    process = launch(
        tmp_path,
        "wait_for_the_signal()\n    raise Interrupted('saved')",
    )
    while len(list(tmp_path.glob("[01]"))) < 2:
        assert process.poll() is None
    process.send_signal(signum)
    printed = process.communicate(timeout=120)
    assert (process.returncode, printed) == (75, ("", "mmoe: saved\n"))


def test_threads_share_the_cores(tmp_path: Path) -> None:
    process = launch(tmp_path, "print(os.environ['OMP_NUM_THREADS'])", "3")
    cores = len(os.sched_getaffinity(0))
    assert process.communicate(timeout=120)[0] == f"{max(1, cores // 3)}\n"


def test_wrong_use_and_a_missing_interpreter_are_user_errors(tmp_path: Path) -> None:
    for arguments, variables, what in [
        (["many", "doctor"], {}, "usage: launch/torchrun.sh N ARGS"),
        (["2", "doctor"], {"PYTHON_BIN": str(tmp_path / "python")}, "no Python at"),
    ]:
        done = subprocess.run([SCRIPT, *arguments], env=os.environ | variables, capture_output=True, text=True)
        assert done.returncode == 2
        assert what in done.stderr
        assert len(done.stderr.splitlines()) == 1
