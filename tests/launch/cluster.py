"""A Slurm cluster of two nodes on this machine, in a folder of its own: munged, slurmctld and two slurmds."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
SEARCHED = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
NODES = ("n1", "n2")

# A requeued job has to wait for cred_expire seconds; two minutes by default.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=10
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=2
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def impossible() -> str:
    """Why there cannot be a cluster here; "" where there can."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=SEARCHED)]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd needs root"


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what} within {seconds:g} s"
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        return [stack.enter_context(socket.create_server(("", 0))).getsockname()[1] for _ in range(count)]


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        names = ("ctld", *NODES)
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        settings = {"host": socket.gethostname(), "user": getpass.getuser(), "folder": self.folder, **ports}
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(**settings))
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {"key-file": key, "socket": self.folder / "munge.sock", "pid-file": self.folder / "munged.pid"}
        files |= {name: self.folder / f"munged.{name[:4]}" for name in ("log-file", "seed-file")}
        # --force: the folders above may be open to others, as /tmp is.
        self.daemon("munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in files.items()))
        wait_for((self.folder / "munge.sock").exists, "munged")
        self.daemon("slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        wait_for(lambda: self.ask("sinfo", "-h", "-N", "-o%N %T").count("idle") == len(NODES), "idle nodes")

    def daemon(self, program: str, *options: str, name: str = "") -> None:
        path = shutil.which(program, path=SEARCHED)
        assert path
        with (self.folder / f"{name or program}.out").open("ab") as output:
            self.daemons[name or program] = subprocess.Popen(
                [path, *options], env=os.environ | self.environment, stdout=output, stderr=output
            )

    def start_node(self, node: str) -> None:
        self.daemon("slurmd", "-D", "-N", node, name=node)

    def kill_node(self, node: str) -> None:
        """Power off: slurmd, what watches its tasks, and the tasks, none of which gets to say anything."""
        slurmd = self.daemons.pop(node)
        slurmd.kill()
        slurmd.wait()
        self.kill_tasks(node)

    def kill_tasks(self, *nodes: str) -> None:
        tasks = [process for process in psutil.process_iter() if self.is_task(process, *nodes)]
        # The batch script has the variables too, and its children have other parents than slurmstepd.
        watching = [process.parent() for process in tasks]
        for process in [*(step for step in watching if step and step.name().startswith("slurmstepd")), *tasks]:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def is_task(self, process: psutil.Process, *nodes: str) -> bool:
        try:
            variables = process.environ()
        except psutil.Error:
            return False
        ours = variables.get("SLURM_CONF") == self.environment["SLURM_CONF"]
        return ours and variables.get("SLURMD_NODENAME") in nodes

    def stop(self) -> None:
        self.kill_tasks(*NODES)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def ask(self, *command: str) -> str:
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True)
        return done.stdout

    def state(self, job: str) -> str:
        """For example RUNNING; with how often it was requeued, for example RUNNING 1."""
        fields = dict(word.split("=", 1) for word in self.ask("scontrol", "show", "job", job).split() if "=" in word)
        return f"{fields['JobState']} {fields['Restarts']}"

    def submit(self, script: Path, *arguments: str, options: list[str], environment: dict[str, str]) -> str:
        """The job's number."""
        command = ["sbatch", "--parsable", *options, str(script), *arguments]
        done = subprocess.run(command, env=environment | self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def wait_for_end(self, job: str, seconds: float = 300.0) -> str:
        """The state that the job ended in."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        wait_for(lambda: self.state(job).startswith(ends), f"end of job {job}", seconds)
        return self.state(job)


@contextmanager
def two_nodes(folder: Path) -> Iterator[Cluster]:
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
