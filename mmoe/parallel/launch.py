"""What a launcher tells its processes, as the variables that torch.distributed reads (launch/README.md).

torchrun sets them itself. Under mpirun MPI is asked once, and left before anything else starts: a rank that ended later
without MPI_Finalize would be an error of its own, and MPI's progress threads would live beside forks and NCCL.
"""

import contextlib
import ctypes
import fcntl
import os
import re
import signal
import socket
import sys
from collections.abc import Mapping
from typing import Any

from mmoe.errors import UserError

# Set for each rank by Open MPI's mpirun, and by Hydra, which starts the ranks of MPICH and Intel MPI. PMI_SIZE would
# not do: `srun --mpi=pmi2` sets it too.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")
# Below the ports that Linux gives to outgoing connections (32768 and above), which could be taken.
_FIRST_PORT, _PORTS = 20000, 12000
_ANSWER_SECONDS = 3.0
_PR_SET_PDEATHSIG = 1

_refusal: UserError | None = None


def adopt() -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT where mpirun or srun started
    several processes; what is set already stays. Called again, it does nothing.

    What hinders it is for :func:`announced` to say, as commands that need no other rank run all the same.
    """
    global _refusal
    _end_with_the_agent()
    _leave_status_file_of_another_host()
    if "WORLD_SIZE" in os.environ or _refusal:
        return
    try:
        if any(name in os.environ for name in _MPI_SIZES):
            found = _from_mpi()
        elif "SLURM_STEP_NUM_TASKS" in os.environ:
            found = from_slurm(os.environ)
        else:
            return
    except UserError as error:
        _refusal = error
        return
    if found["WORLD_SIZE"] == "1":
        return
    # mpirun and srun hand SIGUSR1 on to the ranks; on SIGTERM they end them without waiting for a checkpoint.
    signal.signal(signal.SIGUSR1, lambda number, frame: signal.raise_signal(signal.SIGTERM))
    os.environ.update({"MASTER_ADDR": found["MASTER_ADDR"], "MASTER_PORT": found["MASTER_PORT"]} | found)


def announced() -> tuple[int, int]:
    """(rank, world) as the launcher announced them; (0, 1) without a launcher.

    Raises:
        UserError: a launcher has started several processes that cannot find each other; each would take itself for all.
    """
    adopt()
    if _refusal:
        raise _refusal
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def device_index(devices: int) -> int:
    """Which of the ``devices`` GPUs that this process sees is its own.

    Raises:
        UserError: there are more ranks on this host than GPUs.
    """
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    if devices == 1:
        return 0  # as with srun --gpus-per-task=1, which shows each rank its own
    if rank >= devices:
        what = f"{os.environ.get('LOCAL_WORLD_SIZE', rank + 1)} ranks on a host with {devices} GPUs"
        raise UserError(what, socket.gethostname(), f"start {devices} ranks a host")
    return rank


def _end_with_the_agent() -> None:
    """Under torchrun: a rank whose agent is killed would go on without anybody who ends it, and keep the run's folder
    from the next attempt."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _leave_status_file_of_another_host() -> None:
    """Forgets MMOE_STATUS_FILE where this host does not have its folder, or cannot lock it: the launcher then goes by
    the exit status alone."""
    path = os.environ.get("MMOE_STATUS_FILE")
    if path:
        try:
            with open(path, "a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            del os.environ["MMOE_STATUS_FILE"]


def from_slurm(variables: Mapping[str, str]) -> dict[str, str]:
    """The six variables from those of one of srun's tasks."""
    counts = variables["SLURM_STEP_TASKS_PER_NODE"]
    by_node: list[str] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        by_node += [count] * int(times or 1)
    return {
        "RANK": variables["SLURM_PROCID"],
        "WORLD_SIZE": variables["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": variables["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": by_node[int(variables["SLURM_NODEID"])],
        "MASTER_ADDR": variables.get("MASTER_ADDR") or first_host(variables["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": variables.get("MASTER_PORT") or str(_FIRST_PORT + int(variables["SLURM_JOB_ID"]) % _PORTS),
    }


def first_host(hosts: str) -> str:
    """The first host of a list in Slurm's notation, ``gpu[03-17,20],login``. Not by scontrol, which containers lack."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    assert first, hosts
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def _from_mpi() -> dict[str, str]:
    """The six variables from MPI, which is left again.

    Raises:
        UserError: mpi4py or its MPI library is missing, or is another MPI than mpirun's; no address that all can reach.
    """
    if "OMPI_COMM_WORLD_SIZE" not in os.environ:
        os.environ.setdefault("MPI4PY_MPIABI", "mpich")  # wheels of mpi4py take Open MPI where both are installed
    otherwise = "or start the ranks by launch/torchrun.sh"
    try:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        fix = f"pip install 'mmoe[mpi]' and the MPI library of this mpirun, {otherwise}"
        raise UserError("ranks of mpirun need mpi4py", str(error).splitlines()[0], fix) from None
    MPI.Init()
    world = MPI.COMM_WORLD
    expected = os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or world.size
    if (size := world.size) != int(expected):
        MPI.Finalize()
        what = f"mpirun started {expected} ranks, and MPI sees {size}"
        raise UserError(what, "mpi4py has the library of another MPI", f"install that of this mpirun, {otherwise}")
    host = world.Split_type(MPI.COMM_TYPE_SHARED)
    found = {"RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": host.rank, "LOCAL_WORLD_SIZE": host.size}
    address, port = _meeting_point(world, local_rank=host.rank, alone=host.size == world.size)
    host.Free()
    MPI.Finalize()
    if not address:
        what = "no address of rank 0 can be reached from all hosts"
        raise UserError(what, "MASTER_ADDR", "set MASTER_ADDR and MASTER_PORT to one, on all ranks")
    return {name: str(value) for name, value in found.items()} | {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


def _meeting_point(world: Any, *, local_rank: int, alone: bool) -> tuple[str, int]:
    """An address of rank 0 that a rank of every host has connected to, and a free port there; "" where there is none.
    ``alone`` says that there is one host only."""
    given = os.environ.get("MASTER_ADDR"), int(os.environ.get("MASTER_PORT", "0"))
    if given[0] and given[1]:
        return given[0], given[1]
    with contextlib.ExitStack() as stack:
        offer: tuple[list[str], int] | None = None
        if world.rank == 0:
            listener = stack.enter_context(socket.create_server(("", given[1]), backlog=1024))
            addresses = [given[0]] if given[0] else ["127.0.0.1"] if alone else _own_addresses()
            offer = addresses, listener.getsockname()[1]
        addresses, port = world.bcast(offer)
        # The other ranks of a host reach what its first one reaches.
        reached = [local_rank > 0 or _answers(address, port) for address in addresses]
        everywhere = [all(column) for column in zip(*world.allgather(reached), strict=True)]
    return next((address for address, all_reach in zip(addresses, everywhere, strict=True) if all_reach), ""), port


def _own_addresses() -> list[str]:
    """This host's IPv4 addresses but loopback's, that of its name first."""
    import psutil

    entries = [entry for interface in psutil.net_if_addrs().values() for entry in interface]
    found = [entry.address for entry in entries if entry.family == socket.AF_INET]
    try:
        named = socket.gethostbyname(socket.gethostname())
    except OSError:
        named = ""
    return sorted((address for address in found if not address.startswith("127.")), key=lambda a: a != named)


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=_ANSWER_SECONDS).close()
    except OSError:
        return False
    return True
