"""The same four ranks by every launcher: one curve."""

import shlex
import sys
from pathlib import Path

import pytest
import runs
import training
from hosts import Hosts

PROBE = """
import os
from mmoe.parallel import launch

launch.adopt()
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
line = " ".join([os.uname().nodename, *(os.environ[name] for name in names)])
os.write(1, f"{line}\\n".encode())  # whole, beside other ranks' lines
"""
MPI = ["openmpi", pytest.param("mpich", marks=pytest.mark.slow)]


def test_torchrun_is_one_process(recipe: Path, whole: Path, tmp_path: Path) -> None:
    done = training.run(recipe, tmp_path / "one", *runs.ONE)
    assert done.returncode == 0, done.stderr
    assert runs.difference(tmp_path / "one", whole) <= runs.OTHER_ORDER


@pytest.mark.parametrize("kind", MPI)
def test_mpirun(recipe: Path, whole: Path, tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    variables = runs.environment(**request.getfixturevalue(kind))
    runs.finish(runs.start(runs.command("mpirun.sh", 4, recipe, tmp_path, *runs.FOUR), variables))
    assert runs.difference(tmp_path, whole) == 0


@pytest.mark.slow
def test_torchrun_on_two_hosts(recipe: Path, whole: Path, tmp_path: Path, two_hosts: Hosts) -> None:
    words = runs.command("torchrun.sh", 2, recipe, tmp_path, *runs.FOUR)
    agents = [
        two_hosts.start(address, words, runs.environment(**meeting(two_hosts, rank, "2")))
        for rank, address in enumerate(two_hosts.addresses)
    ]
    printed = [runs.finish(agent) for agent in agents]
    assert runs.difference(tmp_path, whole) == 0
    assert sorted(map(bool, printed)) == [False, True]  # rank 0 alone prints


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["openmpi", "mpich"])
def test_mpirun_on_two_hosts(
    recipe: Path, whole: Path, tmp_path: Path, two_hosts: Hosts, kind: str, request: pytest.FixtureRequest
) -> None:
    variables = runs.environment(**request.getfixturevalue(kind), **mpi_hosts(two_hosts))
    words = runs.command("mpirun.sh", 2, recipe, tmp_path, *runs.FOUR)
    runs.finish(two_hosts.start(two_hosts.addresses[0], words, variables))
    assert runs.difference(tmp_path, whole) == 0


@pytest.mark.parametrize("kind", ["openmpi", "mpich"])
def test_ranks_lie_in_blocks(two_hosts: Hosts, kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Ranks 0 and 1 on the first host: there tensor-parallel groups stay inside of it."""
    (tmp_path / "probe.py").write_text(PROBE)
    # mpi.py starts `PYTHON -m mmoe ARGS`.
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} {tmp_path}/probe.py\n")
    python.chmod(0o755)
    variables = runs.environment(**request.getfixturevalue(kind), **mpi_hosts(two_hosts))
    words = [sys.executable, "-c", f"import sys, mpi; sys.executable = {str(python)!r}; mpi.main(2, [])"]
    variables["PYTHONPATH"] += f":{runs.LAUNCH}"
    printed = runs.finish(two_hosts.start(two_hosts.addresses[0], words, variables))
    first, second = two_hosts.addresses
    assert sorted(line for line in printed.splitlines() if line.startswith("10.")) == [
        f"{first} 0 4 0 2 {first}",
        f"{first} 1 4 1 2 {first}",
        f"{second} 2 4 0 2 {first}",
        f"{second} 3 4 1 2 {first}",
    ]


def meeting(hosts: Hosts, rank: int, count: str) -> dict[str, str]:
    """What torchrun.sh has to be told on each host. The port is free: nothing else runs there."""
    where = {"MASTER_ADDR": hosts.addresses[0], "MASTER_PORT": "29400", "LOCAL_ADDR": hosts.addresses[rank]}
    return where | {"NNODES": count, "NODE_RANK": str(rank), "MMOE_LAST_CALL": "3"}


def mpi_hosts(hosts: Hosts) -> dict[str, str]:
    return {"HOSTS": " ".join(hosts.addresses), "MMOE_RSH": str(hosts.agent)}
