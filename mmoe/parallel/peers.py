"""Which ranks are gone: a process that has ended without a word, or a host that does not answer.

Every rank keeps a listening socket, whose address stands in the job's store. The kernel closes it with the process,
however that ends, and answers for one that is only stopped (SIGSTOP): a refused connection is a dead process. A rank
that ends by an error of its own leaves a word with its exit status in the store first, so that the others end after it
in silence and by that status.

The first rank that finds out puts the end into the store; one of all prints it. Where the store went with rank 0's
host, the lowest rank that is left does.
"""

import errno
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore

from mmoe.ending import LOST
from mmoe.errors import RankLost

CONNECT_SECONDS = 3.0
"""A host that does not answer for so long is taken for gone."""
SEARCH_SECONDS = 10.0
"""For how long a rank that has lost a connection looks for whose fault it was."""
TURN_SECONDS = 2.0
"""For how long one of the searching ranks looks at all others while the rest wait for what it finds."""
ABREAST = 64
"""Connections at a time; and the ranks that look after the store's host when it does not answer. The higher ranks look
after one of these each: nobody's queue of connections runs full."""
NAMED = 8
"""Ranks that a line names one by one."""
_GONE = (errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)


@dataclass(frozen=True)
class End:
    """How the job ends: the same text and exit status on all ranks. ``tell``: this rank is the one to print it."""

    text: str
    status: int
    tell: bool

    def error(self) -> RankLost:
        return RankLost(self.text, self.status, self.tell)


class Peers:
    """The other ranks of a job, reached through ``store`` and through a socket each.

    Where the store has ended, its methods raise RuntimeError, but for :meth:`search`, :meth:`without_store` and
    :meth:`gone`.

    Raises:
        RankLost: ranks have not come within ``seconds``.
    """

    def __init__(self, store: Any, rank: int, world: int, seconds: float) -> None:
        self.rank, self.world = rank, world
        self.store = PrefixStore("peers", store.clone())
        # What a launcher that is not torchrun keeps in rank 0 ends with it.
        self.store_in_first = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self.listener = _listen()
        threading.Thread(target=self._accept, name="peers", daemon=True).start()
        self.store.set(f"address {rank}", json.dumps([*self.listener.getsockname()[:2], socket.gethostname()]))
        keys = [f"address {other}" for other in range(world)]
        self.store.set_timeout(timedelta(seconds=seconds))
        try:
            self.addresses = [tuple(json.loads(text)) for text in self.store.multi_get(keys)]
        except RuntimeError:
            missing = [other for other in range(world) if not self.store.check([keys[other]])]
            text = f"{_ranks(missing)} did not come within {seconds:.0f} s; start again with --resume"
            raise RankLost(text, LOST, tell=rank == 0) from None
        self.store.set_timeout(timedelta(seconds=10))

    def _accept(self) -> None:
        """Takes the connections that others make to see whether this process lives: a full queue would say no."""
        while True:
            try:
                self.listener.accept()[0].close()
            except OSError:
                return

    def leave_word(self, text: str, status: int = LOST) -> None:
        """Says that this rank ends: by an error of its own, after which the others end with its ``status``, or, with an
        empty ``text``, in order or because another did."""
        if text:
            end = json.dumps([f"ended after rank {self.rank}: {text}", status, False])
            self.store.compare_set("end", "", end)
        self.store.set(f"word {self.rank}", "left")

    def first_to_say(self, text: str) -> bool:
        """Whether no other rank has asked this of the same text."""
        return self.store.add(f"said {hashlib.sha256(text.encode()).hexdigest()}", 1) == 1

    def gone(self, ranks: Iterable[int]) -> list[int]:
        """Those of ``ranks`` whose process has ended or whose host does not answer."""
        others = [rank for rank in ranks if rank != self.rank]
        if not others:
            return []
        with ThreadPoolExecutor(min(ABREAST, len(others))) as pool:
            alive = list(pool.map(self._answers, others))
        return [rank for rank, there in zip(others, alive, strict=True) if not there]

    def _answers(self, rank: int) -> bool:
        host, port, _ = self.addresses[rank]
        try:
            socket.create_connection((host, port), CONNECT_SECONDS).close()
        except TimeoutError:
            return False
        except OSError as error:
            return error.errno not in _GONE  # else it is this process that has no file or port left
        return True

    def lost(self, ranks: Iterable[int], noticed: str) -> End | None:
        """The end of the job where one of ``ranks`` is :meth:`gone` without a word; ``noticed`` says where that was
        seen."""
        # In this order: a rank leaves its word before its socket closes.
        silent = [rank for rank in self.gone(ranks) if not self.store.check([f"word {rank}"])]
        if silent:
            self.store.compare_set("end", "", json.dumps([self.describe(silent, noticed), LOST, True]))
        return self.told()

    def told(self) -> End | None:
        """How the job ends, if a rank has found out or said so."""
        if not self.store.check(["end"]):
            return None
        text, status, aloud = json.loads(self.store.get("end"))
        return End(text, status, tell=aloud and self.store.add("told", 1) == 1)

    def search(self, noticed: str) -> End | None:
        """Why this rank's connections broke. None where every rank is there."""
        begin, turn, mine = time.monotonic(), -1, False
        while (elapsed := time.monotonic() - begin) < SEARCH_SECONDS:
            try:
                if (found := self.told()) is not None:
                    return found
                if turn != int(elapsed / TURN_SECONDS):
                    turn = int(elapsed / TURN_SECONDS)
                    mine = self.store.add(f"turn {turn}", 1) == 1
                found = self.lost(range(self.world), noticed) if mine else None
            except RuntimeError:
                found = self.without_store(noticed)
            if found is not None:
                return found
            time.sleep(0.2)
        return None

    def without_store(self, noticed: str) -> End | None:
        """What is known where the store does not answer. Where rank 0 keeps it, others may have ended after that one:
        they are not named."""
        if self.rank >= ABREAST:
            lost = self.gone([self.rank % ABREAST])
            return End(self.describe(lost, noticed), LOST, tell=False) if lost else None
        below = self.gone(range(self.rank))
        lowest = len(below) == self.rank
        if self.store_in_first:
            lost = below[:1] if below[:1] == [0] else []
        else:
            lost = below or (self.gone(range(self.world)) if lowest else [])
        return End(self.describe(lost, noticed), LOST, tell=lowest) if lost else None

    def describe(self, lost: list[int], noticed: str) -> str:
        """One line about ranks that have ended without a word."""
        hosts = ", ".join(list(dict.fromkeys(str(self.addresses[rank][2]) for rank in lost))[:NAMED])
        verb = "is" if len(lost) == 1 else "are"
        return f"{_ranks(lost)} on {hosts} {verb} lost: killed, out of memory, or the host is gone; {noticed}"

    def wait_for_the_others(self, seconds: float) -> None:
        """Keeps the store for those that still look for the reason, where this rank is the one that keeps it."""
        until = time.monotonic() + seconds
        waiting = [rank for rank in range(self.world) if rank != self.rank]
        while self.store_in_first and self.rank == 0 and waiting and time.monotonic() < until:
            waiting = [rank for rank in waiting if not self.store.check([f"word {rank}"])]
            waiting = [rank for rank in waiting if rank not in self.gone(waiting)]
            time.sleep(0.2)

    def close(self) -> None:
        # Without it the thread in accept() would keep the socket.
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def _ranks(ranks: list[int]) -> str:
    more = f", … {len(ranks)} in all" if len(ranks) > NAMED else ""
    return f"rank{'' if len(ranks) == 1 else 's'} {', '.join(map(str, ranks[:NAMED]))}{more}"


def _listen() -> socket.socket:
    """A socket on the address by which this host reaches the job's store."""
    master = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "0"))
    with socket.create_connection(master, 30) as probe:
        family, address = probe.family, probe.getsockname()[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((address, 0))
    listener.listen(socket.SOMAXCONN)
    return listener
