"""Two hosts on one machine: network namespaces with host names and a cable of their own, and a stand-in for ssh."""

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# HOST COMMAND…, as ssh takes them, with options of one word before them.
AGENT = """#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done
host=$1
shift
[ ! -e "{folder}/$host.down" ] || exit 255
exec ip netns exec "{prefix}$host" unshare --uts sh -c 'hostname "$0"; exec sh -c "$1"' "$host" "$*"
"""


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def impossible() -> str:
    """Why there cannot be hosts here; "" where there can."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return "network namespaces need root, ip and unshare: run as root after apt-get install iproute2 util-linux"
    name = f"mmoe-probe-{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("netns", "delete", name)
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"
    return ""


class Hosts:
    """The addresses of both hosts, and commands on them."""

    addresses = ("10.77.0.1", "10.77.0.2")

    def __init__(self, folder: Path) -> None:
        self.folder, self.prefix = folder, f"mmoe-{os.getpid()}-"
        self.agent = folder / "agent"
        self.agent.write_text(AGENT.format(folder=folder, prefix=self.prefix))
        self.agent.chmod(0o755)

    def connect(self) -> None:
        for address in self.addresses:
            ip("netns", "add", self.prefix + address)
        first, second = (self.prefix + address for address in self.addresses)
        ip("-n", first, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second)
        for address in self.addresses:
            name = self.prefix + address
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")

    def disconnect(self) -> None:
        present = ip("netns", "list").split()
        for address in self.addresses:
            if self.prefix + address in present:
                self.kill(address)
                ip("netns", "delete", self.prefix + address)

    def start(self, address: str, command: list[str], environment: dict[str, str]) -> "subprocess.Popen[str]":
        """The command on that host; its output goes to one pipe."""
        return subprocess.Popen(
            [self.agent, address, shlex.join(command)],
            # c10d looks for a name of every address, and there is no DNS.
            env={"GLOO_SOCKET_IFNAME": "eth0", "TORCH_CPP_LOG_LEVEL": "ERROR"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def kill(self, address: str) -> None:
        """Power off: nothing on the host gets to say anything, and nobody can log in."""
        (self.folder / f"{address}.down").touch()
        while pids := ip("netns", "pids", self.prefix + address).split():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    with tempfile.TemporaryDirectory() as folder:
        hosts = Hosts(Path(folder))
        try:
            hosts.connect()
            yield hosts
        finally:
            hosts.disconnect()
