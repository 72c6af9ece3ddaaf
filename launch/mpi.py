"""One attempt through mpirun, of Open MPI or of MPICH (and what else Hydra starts).

mpi.py N ARGS…   runs `mmoe ARGS` on N ranks of this host, or of each host of HOSTS that answers.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from mmoe.ending import LOST, USER_ERROR, say

ANSWER_SECONDS = 20
# Open MPI hands on its own variables alone; Hydra all.
HANDED_ON = (
    "CUDA_", "GLOO_", "HF_", "LD_LIBRARY_PATH", "MASTER_", "MMOE_", "MPI4PY_", "NCCL_", "NVTE_", "OMP_", "PYTHON",
    "TORCH", "UCX_",
)  # fmt: skip


def answers(shell: str, host: str) -> bool:
    try:
        done = subprocess.run(
            [shell, host, "true"], stdin=subprocess.DEVNULL, capture_output=True, timeout=ANSWER_SECONDS
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def answering(shell: str, hosts: list[str]) -> list[str]:
    """Those of ``hosts`` that can be logged into."""
    if not hosts:
        return []
    with ThreadPoolExecutor(len(hosts)) as pool:
        found = pool.map(lambda host: answers(shell, host), hosts)
    return [host for host, there in zip(hosts, found, strict=True) if there]


def default_mpirun() -> str:
    """That of a wheel beside the interpreter, else of the system."""
    places = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    return shutil.which("mpirun", path=places) or "mpirun"


def command(mpirun: str, ranks: int, hosts: list[str]) -> list[str]:
    """mpirun with its placement: ranks one after the other on a host, then on the next one.

    Raises:
        OSError: there is no such mpirun.
    """
    said = subprocess.run([mpirun, "--version"], capture_output=True, text=True).stdout
    total = str(ranks * max(1, len(hosts)))
    if "HYDRA" in said or "Intel(R) MPI" in said:
        return [mpirun, "-n", total, "-ppn", str(ranks), *(["-hosts", ",".join(hosts)] if hosts else [])]
    # Bound to a core, the threads of a rank would share it.
    words = [mpirun, "-n", total, "--map-by", f"ppr:{ranks}:node:OVERSUBSCRIBE", "--bind-to", "none"]
    if hosts:
        words += ["--host", ",".join(f"{host}:{ranks}" for host in hosts)]
        words += [word for name in os.environ if name.startswith(HANDED_ON) for word in ("-x", name)]
    return words


def prepare(shell: str) -> None:
    """Tells every mpirun how to reach the other hosts, in the variables of each."""
    path = shutil.which(shell) or shell
    os.environ.update({"OMPI_MCA_plm_rsh_agent": path, "PRTE_MCA_plm_ssh_agent": path})
    os.environ.update({"HYDRA_LAUNCHER": "ssh", "HYDRA_LAUNCHER_EXEC": path})
    if os.geteuid() == 0:  # as in most containers
        allow = [f"{name}_ALLOW_RUN_AS_ROOT" for name in ("OMPI", "PRTE")]
        os.environ.update({name + more: "1" for name in allow for more in ("", "_CONFIRM")})


def main(ranks: int, arguments: list[str]) -> int:
    """Becomes mpirun; an exit status is for where it cannot."""
    hosts = os.environ.get("HOSTS", "").split()
    shell, mpirun = os.environ.get("MMOE_RSH", "ssh"), os.environ.get("MPIRUN") or default_mpirun()
    least = int(os.environ.get("NNODES", str(len(hosts))).split(":")[0])
    there = answering(shell, hosts)
    if len(there) < least:
        say(f"mmoe: {len(there)} of {len(hosts)} hosts answer, {least} are needed")
        return LOST
    if len(there) < len(hosts):
        gone = ", ".join(host for host in hosts if host not in there)
        say(f"mmoe: going on without {gone}: no answer")
    prepare(shell)
    try:
        words = command(mpirun, ranks, there)
    except OSError as error:
        say(f"mmoe: {mpirun}: {error.strerror}: install Open MPI or MPICH, or name one with MPIRUN")
        return USER_ERROR
    flags = os.environ.get("MPIRUN_FLAGS", "").split()
    return os.execvp(words[0], [*words, *flags, sys.executable, "-m", "mmoe", *arguments])


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
