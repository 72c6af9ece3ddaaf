"""The recipe that every launcher runs, its run by launch/torchrun.sh, a Slurm cluster and two hosts."""

from collections.abc import Iterator
from pathlib import Path

import cluster
import hosts
import pytest
import runs
import sets
import training


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("launched")
    sets.write_set(root, "varied", sets.varied(40))
    return training.write_recipe(root, sets.write_mixture(root, varied=1.0))


@pytest.fixture(scope="session")
def whole(recipe: Path) -> Path:
    """The uninterrupted run on four ranks."""
    out = recipe.parent / "whole"
    runs.finish(runs.start(runs.command("torchrun.sh", 4, recipe, out, *runs.FOUR), runs.environment()))
    return out


@pytest.fixture(scope="session")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.Cluster]:
    if reason := cluster.impossible():
        pytest.skip(reason)
    with cluster.two_nodes(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture
def two_hosts() -> Iterator[hosts.Hosts]:
    if reason := hosts.impossible():
        pytest.skip(reason)
    with hosts.two_hosts() as connected:
        yield connected


@pytest.fixture
def openmpi() -> dict[str, str]:
    return mpi_or_skip("openmpi")


@pytest.fixture
def mpich() -> dict[str, str]:
    return mpi_or_skip("mpich")


def mpi_or_skip(kind: str) -> dict[str, str]:
    try:
        return runs.mpi(kind)
    except LookupError as error:
        pytest.skip(str(error))
