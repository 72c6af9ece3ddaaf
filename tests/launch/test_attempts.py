"""launch/attempts.py: which ends are followed by another attempt, how often, after how long, and what signals do."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs

# Ends as its attempt is told to: a status, a status entered by a rank (and then 1), a signal, or waiting for one.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

folder, ends = Path(sys.argv[1]), sys.argv[2].split(",")
number = len(list(folder.glob("attempt*")))
(folder / f"attempt{number}").write_text(" ".join([os.environ["MMOE_ATTEMPT"], *sys.argv[3:]]))
for end in ends[min(number, len(ends) - 1)].split("+"):
    if end == "wait":
        signal.signal(signal.SIGUSR1, lambda *_: os._exit(75))
        (folder / "ready").touch()
        time.sleep(60)
    elif end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif end.startswith("rank"):
        with open(os.environ["MMOE_STATUS_FILE"], "a") as file:
            file.write(json.dumps({"rank": 0, "status": int(end[4:]), "message": ""}) + "\\n")
    else:
        sys.exit(int(end))
sys.exit(1)
"""


def start(folder: Path, ends: str, *arguments: str, **variables: str) -> "subprocess.Popen[str]":
    (folder / "stand_in.py").write_text(STAND_IN)
    words = [sys.executable, str(runs.LAUNCH / "attempts.py"), sys.executable, str(folder / "stand_in.py")]
    settings = {"MMOE_BACKOFF": "0.05"} | variables
    return runs.start([*words, str(folder), ends, "--", *arguments], runs.environment(**settings))


def attempts(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("attempt*"))]


def test_failures_are_followed_by_attempts_that_resume(tmp_path: Path) -> None:
    process = start(tmp_path, "1,rank69,kill,0", "train", "tiny")
    printed = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0
    assert attempts(tmp_path) == ["0 train tiny", *(f"{number} train tiny --resume" for number in (1, 2, 3))]
    assert printed == [
        "mmoe: attempt 0 ended with status 1 (a defect): restarting in 0.05 s, 3 of 3 restarts left",
        "mmoe: attempt 1 ended with status 69 (another rank was lost): restarting in 0.1 s, 2 of 3 restarts left",
        "mmoe: attempt 2 ended with status 137 (SIGKILL): restarting in 0.2 s, 1 of 3 restarts left",
    ]


def test_restarts_are_bounded_and_wait_twice_as_long_each_time(tmp_path: Path) -> None:
    begin = time.monotonic()
    process = start(tmp_path, "255", "train", MMOE_RESTARTS="2", MMOE_BACKOFF="0.3")
    printed = process.communicate(timeout=60)[0].splitlines()
    assert time.monotonic() - begin > 0.3 + 0.6
    assert (process.returncode, len(attempts(tmp_path))) == (255, 3)
    assert printed[-1] == "mmoe: attempt 2 ended with status 255: MMOE_RESTARTS=2 restarts are used up"


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        ("0", 0),
        ("2", 2),
        ("75", 75),
        ("rank2", 2),  # what the ranks say counts, not what their launcher makes of it
        ("rank75+rank2+rank69", 2),
        ("rank75", 75),
        ("rank75+0", 0),  # ranks that were stopped so that others could join them
    ],
)
def test_what_is_not_restarted(tmp_path: Path, ends: str, status: int) -> None:
    process = start(tmp_path, ends, "train")
    assert (process.communicate(timeout=60)[0], process.returncode) == ("", status)
    assert len(attempts(tmp_path)) == 1


def test_only_training_is_restarted_unasked(tmp_path: Path) -> None:
    process = start(tmp_path, "1", "evaluate")
    assert (process.communicate(timeout=60)[0], process.returncode, len(attempts(tmp_path))) == ("", 1, 1)
    process = start(tmp_path, "1,0", "evaluate", MMOE_RESTARTS="1")
    process.communicate(timeout=60)
    assert (process.returncode, attempts(tmp_path)[1:]) == (0, ["0 evaluate"])


def test_an_mpirun_that_ends_well_without_a_word_of_its_ranks_has_lost_them(tmp_path: Path) -> None:
    process = start(tmp_path, "rank75+0,0,rank0+0", "train", MMOE_NEEDS_WORD="1")
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert printed.count("ended with status 69 (another rank was lost): restarting") == 2


@pytest.mark.parametrize("variables", [{"MMOE_ATTEMPT": "2"}, {"NNODES": "1:2"}])
def test_a_requeued_job_and_hosts_that_come_and_go_resume_at_once(tmp_path: Path, variables: dict[str, str]) -> None:
    process = start(tmp_path, "0", "train", **variables)
    process.communicate(timeout=60)
    assert attempts(tmp_path) == [f"{variables.get('MMOE_ATTEMPT', '0')} train --resume"]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_handed_on_and_ends_the_attempts(tmp_path: Path, sent: signal.Signals) -> None:
    process = start(tmp_path, "wait", "train", MMOE_STOP_SIGNAL="SIGUSR1")
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    process.send_signal(sent)
    assert (process.communicate(timeout=60)[0], process.returncode) == ("", 75)


def test_a_signal_while_waiting_ends_the_attempts(tmp_path: Path) -> None:
    process = start(tmp_path, "1", "train", MMOE_BACKOFF="600")
    assert process.stdout
    assert "restarting in 600 s" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert (process.returncode, len(attempts(tmp_path))) == (1, 1)


def test_ranks_that_do_not_notice_another_ones_end_are_ended(tmp_path: Path) -> None:
    process = start(tmp_path, "rank69+wait,0", "train", MMOE_GRACE="0.5")
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert re.fullmatch(r"mmoe: attempt 0 ended with status 69 .* restarting in 0.05 s.*\n", printed)
