"""Which ranks are gone: a process that has ended without a word, or a host that does not answer.

Every rank keeps a listening socket, whose address stands in the job's store. The kernel closes it with the process,
however that ends, and answers for one that is only stopped (SIGSTOP): a refused connection is a dead process. A rank
that ends by an error of its own leaves a word in the store first, so that the others end after it in silence.

The first rank that finds out puts the line into the store; one of all prints it.
"""

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore

CONNECT_SECONDS = 3.0
"""A host that does not answer for so long is taken for gone."""
SEARCH_SECONDS = 10.0
"""For how long a rank that has lost a connection looks for whose fault it was."""
NAMED = 8
"""Ranks that a line names one by one."""


@dataclass(frozen=True)
class End:
    """How the job ended, the same text on all ranks; ``tell``: this rank is the one to print it."""

    text: str
    tell: bool


class Peers:
    """The other ranks of a job, reached through ``store`` and through a socket each.

    Where the store has ended, its methods raise RuntimeError, but for :meth:`search` and those that only connect.
    """

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.store = PrefixStore("peers", store.clone())
        self.store.set_timeout(timedelta(seconds=60))
        # What a launcher that is not torchrun keeps in rank 0 ends with it.
        self.store_in_first = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self.listener = _listen()
        self.store.set(f"address {rank}", json.dumps([*self.listener.getsockname()[:2], socket.gethostname()]))
        texts = self.store.multi_get([f"address {other}" for other in range(world)])
        self.addresses = [tuple(json.loads(text)) for text in texts]
        self.store.set_timeout(timedelta(seconds=10))

    def drain(self) -> None:
        """Takes the connections that others made to see whether this process lives: a full queue would say no."""
        while True:
            try:
                self.listener.accept()[0].close()
            except OSError:
                return

    def leave_word(self, text: str) -> None:
        """Says that this rank ends, and why: first of all ranks or, with an empty ``text``, because another did."""
        self.store.compare_set(f"word {self.rank}", "", text)

    def first_to_say(self, text: str) -> bool:
        """Whether no other rank has asked this of the same text."""
        return self.store.add(f"said {hashlib.sha256(text.encode()).hexdigest()}", 1) == 1

    def gone(self, ranks: Iterable[int]) -> list[int]:
        """Those of ``ranks`` whose process has ended or whose host does not answer."""
        others = [rank for rank in ranks if rank != self.rank]
        if not others:
            return []
        with ThreadPoolExecutor(min(32, len(others))) as pool:
            alive = list(pool.map(self._answers, others))
        return [rank for rank, there in zip(others, alive, strict=True) if not there]

    def _answers(self, rank: int) -> bool:
        host, port, _ = self.addresses[rank]
        try:
            socket.create_connection((host, port), CONNECT_SECONDS).close()
        except OSError:
            return False
        return True

    def silent_ends(self, ranks: Iterable[int]) -> list[int]:
        """Those of ``ranks`` that are :meth:`gone` and have left no word."""
        # In this order: a rank leaves its word before its socket closes.
        return [rank for rank in self.gone(ranks) if not self.store.check([f"word {rank}"])]

    def search(self, noticed: str) -> End | None:
        """Why this rank's connections broke; ``noticed`` says where it saw it. None where every rank is there."""
        until = time.monotonic() + SEARCH_SECONDS
        while time.monotonic() < until:
            try:
                found = self.told() or self._look(noticed)
            except RuntimeError:
                found = self.without_store(noticed)
            if found is not None:
                return found
            time.sleep(0.2)
        return None

    def _look(self, noticed: str) -> End | None:
        lost = self.silent_ends(range(self.world))
        if lost:
            return self.tell(self.describe(lost, noticed))
        for rank in range(self.world):
            if self.store.check([f"word {rank}"]) and (word := self.store.get(f"word {rank}").decode()):
                self.store.set("end", f"ended after rank {rank}: {word}")
                return End(f"ended after rank {rank}: {word}", tell=False)
        return None

    def without_store(self, noticed: str) -> End | None:
        """What is known where the store does not answer. Where rank 0 keeps it, others may have ended after that one:
        they are not looked at."""
        lost = self.gone([0] if self.store_in_first else range(self.world))
        return End(self.describe(lost, noticed), tell=self.rank == 1 or not self.store_in_first) if lost else None

    def tell(self, text: str) -> End:
        """The line that all ranks end with: ``text``, unless another rank was faster."""
        first = self.store.compare_set("end", "", text).decode()
        return End(first, tell=self.store.add("told", 1) == 1)

    def told(self) -> End | None:
        """The line, if a rank has found out."""
        if not self.store.check(["end"]):
            return None
        text = self.store.get("end").decode()
        return End(text, tell=not text.startswith("ended after") and self.store.add("told", 1) == 1)

    def describe(self, lost: list[int], noticed: str) -> str:
        """One line about ranks that have ended without a word."""
        hosts = ", ".join(dict.fromkeys(str(self.addresses[rank][2]) for rank in lost))
        names = ", ".join(map(str, lost[:NAMED])) + (f", … {len(lost)} in all" if len(lost) > NAMED else "")
        one = len(lost) == 1
        return (
            f"rank{'' if one else 's'} {names} on {hosts} {'is' if one else 'are'} lost: killed, out of memory, or the "
            f"host is gone; {noticed}"
        )

    def wait_for_the_others(self, seconds: float) -> None:
        """Keeps the store for those that still look for the reason, where this rank is the one that keeps it."""
        until = time.monotonic() + seconds
        waiting = [rank for rank in range(self.world) if rank != self.rank]
        while self.store_in_first and self.rank == 0 and waiting and time.monotonic() < until:
            waiting = [rank for rank in waiting if rank not in self.gone(waiting)]
            time.sleep(0.1)

    def close(self) -> None:
        self.listener.close()


def _listen() -> socket.socket:
    """A socket on the address by which this host reaches the job's store."""
    master = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "0"))
    with socket.create_connection(master, 30) as probe:
        family, address = probe.family, probe.getsockname()[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((address, 0))
    listener.listen(socket.SOMAXCONN)
    listener.setblocking(False)
    return listener
