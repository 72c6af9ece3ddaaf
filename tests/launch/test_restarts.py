"""Runs that lose a rank or a host and go on by themselves."""

import re
from pathlib import Path

import pytest
import runs
from hosts import Hosts
from test_curves import meeting, mpi_hosts


@pytest.mark.slow
def test_a_killed_rank_costs_nothing_but_time(recipe: Path, whole: Path, tmp_path: Path) -> None:
    process = runs.start(runs.command("torchrun.sh", 4, recipe, tmp_path, *runs.FOUR), runs.environment())
    runs.wait_for_checkpoint(tmp_path, process)
    runs.rank_process(tmp_path, 3).kill()
    printed = runs.finish(process)
    assert len(re.findall(r"^mmoe: rank 3 on .* is lost", printed, re.MULTILINE)) == 1
    assert "left no message" not in printed
    assert printed.count("restarting in 0.5 s, 3 of 3 restarts left") == 1
    assert runs.difference(tmp_path, whole) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["openmpi", "mpich"])
def test_a_killed_rank_of_mpirun(
    recipe: Path, whole: Path, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    variables = runs.environment(**request.getfixturevalue(kind))
    process = runs.start(runs.command("mpirun.sh", 4, recipe, tmp_path, *runs.FOUR), variables)
    runs.wait_for_checkpoint(tmp_path, process)
    counted = {"openmpi": "OMPI_COMM_WORLD_RANK", "mpich": "PMI_RANK"}
    runs.rank_process(tmp_path, 3, counted[kind]).kill()
    assert runs.finish(process).count("restarting in 0.5 s, 3 of 3 restarts left") == 1
    assert runs.difference(tmp_path, whole) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["openmpi", "mpich"])
def test_mpirun_saves_on_request(
    recipe: Path, whole: Path, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    variables = runs.environment(**request.getfixturevalue(kind))
    process = runs.start(runs.command("mpirun.sh", 4, recipe, tmp_path, *runs.FOUR), variables)
    runs.wait_for_checkpoint(tmp_path, process)
    process.terminate()
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 75, printed
    assert "saved; go on with --resume" in printed
    runs.finish(runs.start(runs.command("mpirun.sh", 4, recipe, tmp_path, "--resume", *runs.FOUR), variables))
    assert runs.difference(tmp_path, whole) == 0


@pytest.mark.slow
def test_torchrun_goes_on_without_a_lost_host(recipe: Path, whole: Path, tmp_path: Path, two_hosts: Hosts) -> None:
    words = runs.command("torchrun.sh", 2, recipe, tmp_path, *runs.FOUR)
    stays, goes = (
        two_hosts.start(address, words, runs.environment(**meeting(two_hosts, rank, "1:2")))
        for rank, address in enumerate(two_hosts.addresses)
    )
    runs.wait_for_checkpoint(tmp_path, stays)
    two_hosts.kill(two_hosts.addresses[1])
    goes.communicate(timeout=60)
    assert goes.returncode != 0
    assert runs.finish(stays).count("restarting in 0.5 s") == 1
    assert runs.difference(tmp_path, whole) <= runs.OTHER_ORDER


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["openmpi", "mpich"])
def test_mpirun_goes_on_without_a_lost_host(
    recipe: Path, whole: Path, tmp_path: Path, two_hosts: Hosts, kind: str, request: pytest.FixtureRequest
) -> None:
    first, second = two_hosts.addresses
    variables = runs.environment(**request.getfixturevalue(kind), **mpi_hosts(two_hosts), NNODES="1:2")
    words = runs.command("mpirun.sh", 2, recipe, tmp_path, *runs.FOUR)
    process = two_hosts.start(first, words, variables)
    runs.wait_for_checkpoint(tmp_path, process)
    two_hosts.kill(second)
    printed = runs.finish(process)
    assert f"mmoe: going on without {second}: no answer" in printed
    assert runs.difference(tmp_path, whole) <= runs.OTHER_ORDER
