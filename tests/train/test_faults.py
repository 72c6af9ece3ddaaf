"""What becomes of a run of two ranks when one of them is signalled, stops, goes, or is not like the other.

The ranks are started one by one, without an agent: the job's store is rank 0's, as under mpirun and Slurm.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import training

LINK, FIRST_ADDRESS, SECOND_ADDRESS = "veth0", "10.213.77.1", "10.213.77.2"
TWO = ("--set", "train.steps=40", "parallel.expert=2")


class Ranks:
    """Processes of one job, their stderr in files of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.processes = folder, list[subprocess.Popen[bytes]]()
        self.both: dict[str, str] = {}
        """Variables of both."""

    def start(
        self,
        recipe: Path,
        out: Path,
        *options: str,
        of_second: tuple[str, ...] = (),
        hosts: tuple[str, str] | None = None,
        **second: str,
    ) -> None:
        """``of_second`` and ``second``: the second rank's own options and variables; ``hosts``: network namespaces."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        for rank in range(2):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
            variables = {
                **training.environment(),
                **self.both,
                **own,
                "MASTER_PORT": str(port),
                **(second if rank else {}),
            }
            command = training.command(recipe, out, *options, *(of_second if rank else ()))
            if hosts:
                variables |= {"MASTER_ADDR": FIRST_ADDRESS, "GLOO_SOCKET_IFNAME": LINK}
                command = ["ip", "netns", "exec", hosts[rank], *command]
            with (self.folder / f"{rank}.log").open("wb") as log:
                self.processes.append(subprocess.Popen(command, env=variables, stderr=log))

    def log(self, rank: int) -> str:
        return (self.folder / f"{rank}.log").read_text()

    def lines(self) -> list[str]:
        """What the ranks said at their ends."""
        return [line for rank in range(2) for line in self.log(rank).splitlines() if line.startswith("mmoe: ")]

    def wait(self, seconds: float = 60) -> list[int]:
        until = time.monotonic() + seconds
        return [process.wait(until - time.monotonic()) for process in self.processes]

    def until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, [self.log(0), self.log(1)]
            time.sleep(0.02)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    job = Ranks(tmp_path)
    try:
        yield job
    finally:
        job.close()


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces joined by a link."""
    names = f"mmoe-a-{os.getpid()}", f"mmoe-b-{os.getpid()}"

    def ip(*arguments: str) -> bool:
        return subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode == 0

    if shutil.which("ip") is None or not all(ip("netns", "add", name) for name in names):
        pytest.skip("no network namespace can be made here: needs root and Debian's iproute2")
    try:
        assert ip("-n", names[0], "link", "add", LINK, "type", "veth", "peer", "name", LINK, "netns", names[1])
        for name, address in zip(names, (FIRST_ADDRESS, SECOND_ADDRESS), strict=True):
            assert ip("-n", name, "addr", "add", f"{address}/24", "dev", LINK)
            assert ip("-n", name, "link", "set", "lo", "up")
            assert ip("-n", name, "link", "set", LINK, "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def stepping(run: Path, steps: int = 3) -> Callable[[], bool]:
    path = run / "metrics.jsonl"
    return lambda: path.exists() and path.read_text().count("\n") >= steps


@pytest.mark.latest
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_by_the_other(finished: tuple[Path, Path], ranks: Ranks, victim: int) -> None:
    """Rank 0 takes the job's store with it."""
    run = ranks.folder / "run"
    ranks.start(finished[0], run, *TWO)
    ranks.until(stepping(run))
    ranks.processes[victim].kill()
    statuses = ranks.wait()
    assert statuses[1 - victim] == 69
    assert len(ranks.lines()) == 1, ranks.lines()
    assert f"mmoe: rank {victim} on " in ranks.lines()[0]
    assert "is lost" in ranks.lines()[0]
    assert "Traceback" not in ranks.log(1 - victim)


@pytest.mark.slow
def test_two_hosts_that_lose_each_other_both_end(
    finished: tuple[Path, Path], ranks: Ranks, hosts: tuple[str, str]
) -> None:
    """No connection is closed: packets stop. To each of the two the other one is the host that is gone."""
    run = ranks.folder / "run"
    ranks.start(finished[0], run, "--set", "train.steps=100000", "parallel.expert=2", hosts=hosts)
    ranks.until(stepping(run))
    subprocess.run(["ip", "-n", hosts[1], "link", "set", LINK, "down"], check=True)
    assert ranks.wait(60) == [69, 69]
    for rank in range(2):
        (line,) = [line for line in ranks.log(rank).splitlines() if line.startswith("mmoe: ")]
        assert f"mmoe: rank {1 - rank} on " in line


@pytest.mark.parametrize("one", [0, 1])
def test_sigterm_to_one_rank_saves_on_all(finished: tuple[Path, Path], ranks: Ranks, one: int) -> None:
    run = ranks.folder / "run"
    ranks.start(finished[0], run, *TWO)
    ranks.until(stepping(run))
    ranks.processes[one].send_signal(signal.SIGTERM)
    assert ranks.wait() == [75, 75]
    step = training.curve(run)[-1]["step"]
    assert (run / "checkpoints" / "latest").read_text() == f"step_{step:08d}\n"
    assert len(ranks.lines()) == 1
    assert f"stopped after step {step} of 40, saved" in ranks.lines()[0]


def test_a_stopped_rank_is_named_and_the_run_goes_on_with_it(finished: tuple[Path, Path], ranks: Ranks) -> None:
    run = ranks.folder / "run"
    ranks.start(finished[0], run, *TWO, "train.stall_warning_seconds=2")
    ranks.until(stepping(run))
    ranks.processes[1].send_signal(signal.SIGSTOP)
    ranks.until(lambda: "watchdog: " in ranks.log(0))
    ranks.processes[1].send_signal(signal.SIGCONT)
    assert ranks.wait() == [0, 0]
    assert "rank 1 is stopped or dead: not heard of for" in ranks.log(0)
    assert [row["step"] for row in training.curve(run)] == list(range(1, 41))


def test_a_vanished_shard_ends_the_run_by_its_name_and_the_run_goes_on_once_it_is_back(
    finished: tuple[Path, Path], ranks: Ranks
) -> None:
    root, run = ranks.folder / "data", ranks.folder / "run"
    shutil.copytree(finished[0].parent, root, ignore=lambda folder, names: [n for n in names if n == "whole"])
    shard = root / "varied" / "shard-000002.tar"
    shard.rename(root / "gone")
    ranks.start(finished[0], run, *TWO, "train.steps=10", f"data.root={root}")
    assert ranks.wait() == [2, 2]
    assert all("a shard of the data set is gone" in line and str(shard) in line for line in ranks.lines())
    assert ranks.lines()
    (root / "gone").rename(shard)
    done = training.run(finished[0], run, "--resume", *TWO, "train.steps=10", f"data.root={root}", ranks=2)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in training.curve(run)] == list(range(1, 11))


@pytest.mark.parametrize("one", [0, 1])
def test_the_others_end_after_a_rank_with_an_error(finished: tuple[Path, Path], ranks: Ranks, one: int) -> None:
    """Rank 0 keeps the store until the other one has read why."""
    (ranks.folder / "sitecustomize.py").write_text(
        "import os\nimport mmoe.train.run as run\nfrom mmoe.errors import UserError\n"
        "def refuse(recipe):\n    raise UserError('no data', 'here')\n"
        f"if os.environ.get('RANK') == '{one}':\n    run._fits = refuse\n"
    )
    ranks.both = {"PYTHONPATH": f"{ranks.folder}{os.pathsep}{training.ROOT}"}
    ranks.start(finished[0], ranks.folder / "run", *TWO)
    assert ranks.wait() == [2, 2]
    assert ranks.lines() == [f"mmoe: rank {one}: no data (here)"]


@pytest.mark.parametrize(
    "what",
    [
        "the recipe",
        pytest.param("the code of mmoe", marks=pytest.mark.slow),
        pytest.param("torch", marks=pytest.mark.slow),
    ],
)
def test_ranks_that_are_not_alike_are_refused_before_the_first_step(
    finished: tuple[Path, Path], ranks: Ranks, what: str
) -> None:
    run, options, variables = ranks.folder / "run", (), {}
    if what == "the recipe":
        options = ("parallel.expert=1", "optimizer.lr=0.01")  # another grid too
    else:
        name, lie = {
            "the code of mmoe": ("code", "'another one'"),
            "torch": ("versions", "{**right(), 'torch': '2.0'}"),
        }[what]
        text = f"import mmoe.preflight as preflight\nright = preflight.{name}\npreflight.{name} = lambda: {lie}\n"
        (ranks.folder / "sitecustomize.py").write_text(text)
        variables = {"PYTHONPATH": f"{ranks.folder}{os.pathsep}{training.ROOT}"}
    ranks.start(finished[0], run, *TWO, of_second=options, **variables)
    assert ranks.wait() == [2, 2]
    (line,) = ranks.lines()
    assert re.search(rf"the ranks differ: .*{what} is .* on rank 1 \(", line)
    assert not (run / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_clock_an_hour_off_is_named_and_changes_nothing(finished: tuple[Path, Path], ranks: Ranks) -> None:
    run = ranks.folder / "run"
    (ranks.folder / "sitecustomize.py").write_text(
        "import time\nright, right_ns = time.time, time.time_ns\n"
        "time.time, time.time_ns = lambda: right() + 3600, lambda: right_ns() + 3600 * 10**9\n"
    )
    ranks.start(finished[0], run, *TWO, PYTHONPATH=f"{ranks.folder}{os.pathsep}{training.ROOT}")
    assert ranks.wait() == [0, 0]
    (line,) = ranks.lines()
    assert re.match(r"mmoe: warning: the clock of rank 1 \(.*\) is 3600\.\d s ahead", line)
    right = training.run(finished[0], ranks.folder / "right", *TWO, ranks=2)
    assert right.returncode == 0, right.stderr
    assert training.curve(run) == training.curve(ranks.folder / "right")
