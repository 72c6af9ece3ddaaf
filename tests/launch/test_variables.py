"""mmoe.parallel.launch: RANK and its peers from what each launcher gives."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runs

from mmoe.errors import UserError
from mmoe.parallel import launch

TASK = {
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_STEP_NODELIST": "gpu[03-04,09]",
    "SLURM_JOB_ID": "12345",
}
LISTS = {
    "gpu1": "gpu1",
    "gpu[03-17,20],login": "gpu03",
    "login,gpu[03-17]": "login",
    "rack[1-2]-node[07,09]": "rack1-node07",
}


def test_slurm() -> None:
    assert launch.from_slurm(TASK) == {
        "RANK": "9",
        "WORLD_SIZE": "11",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "20345",
    }
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert launch.from_slurm(TASK | given).items() >= given.items()


@pytest.mark.parametrize("hosts", LISTS)
def test_the_first_host_of_slurms_lists(hosts: str) -> None:
    assert launch.first_host(hosts) == LISTS[hosts]


@pytest.mark.skipif(not shutil.which("scontrol"), reason="no scontrol: apt-get install slurm-client")
@pytest.mark.parametrize("hosts", LISTS)
def test_scontrol_agrees(hosts: str, tmp_path: Path) -> None:
    # It wants a configuration, and asks no daemon.
    (tmp_path / "slurm.conf").write_text("ClusterName=none\nSlurmctldHost=none\nNodeName=none\nPartitionName=none\n")
    command = ["scontrol", "show", "hostnames", hosts]
    variables = runs.environment(SLURM_CONF=str(tmp_path / "slurm.conf"))
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == LISTS[hosts]


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert launch.device_index(8) == 3
    assert launch.device_index(1) == 0  # --gpus-per-task=1
    with pytest.raises(UserError, match="4 ranks on a host with 2 GPUs"):
        launch.device_index(2)


def announced(**variables: str) -> subprocess.CompletedProcess[str]:
    code = "from mmoe.parallel import launch; print(launch.announced(), 'mpi4py' in __import__('sys').modules)"
    environment = runs.environment(**variables)
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_without_a_launcher_and_under_torchrun_mpi_is_left_alone() -> None:
    assert announced().stdout == "(0, 1) False\n"
    under_torchrun = announced(RANK="3", WORLD_SIZE="4", OMPI_COMM_WORLD_SIZE="4", SLURM_STEP_NUM_TASKS="2")
    assert under_torchrun.stdout == "(3, 4) False\n"
    assert announced(**TASK).stdout == "(9, 11) False\n"
    alone = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0"}
    assert announced(**TASK | alone).stdout == "(0, 1) False\n"
    # `srun --mpi=pmi2` sets these, and the steps of sbatch's own script have no tasks.
    assert announced(PMI_SIZE="4", PMI_RANK="1", SLURM_NTASKS="4", SLURM_PROCID="0").stdout == "(0, 1) False\n"


def test_mpirun_without_mpi4py_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "mpi4py.py").write_text("raise ImportError('no mpi4py')")
    done = announced(OMPI_COMM_WORLD_SIZE="2", PYTHONPATH=f"{tmp_path}:{runs.environment()['PYTHONPATH']}")
    assert "UserError: ranks of mpirun need mpi4py (no mpi4py): pip install 'mmoe[mpi]'" in done.stderr


def test_ranks_of_another_mpi_are_refused(openmpi: dict[str, str]) -> None:
    """MPI then takes each rank for a run of its own."""
    done = announced(OMPI_COMM_WORLD_SIZE="2", **openmpi)
    assert "UserError: mpirun started 2 ranks, and MPI sees 1" in done.stderr


def test_a_status_file_of_another_host_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, there in ((tmp_path / "statuses", True), (tmp_path / "elsewhere" / "statuses", False)):
        monkeypatch.setenv("MMOE_STATUS_FILE", str(path))
        launch.adopt()
        assert ("MMOE_STATUS_FILE" in os.environ) is there
