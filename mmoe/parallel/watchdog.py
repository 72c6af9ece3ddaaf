"""Says in one line which rank holds up which collective, long before the backend's timeout ends the job.

A thread of every rank publishes, every few seconds and through a connection of its own to the job's store, which
collectives the rank has entered and which it waits for (:mod:`mmoe.parallel.calls`), where its main thread is and
whether it is in a long phase. The lowest rank that answers reads them. Once a rank has waited ``limit`` seconds, that
rank prints one line on stderr: the collective, its group, who waits, since when, who has not entered it and what those
do instead. Nothing is stopped: the run goes on if the wait ends, and ends by the group's timeout if not.

Long and legitimate: while a checkpoint is written or read, ranks are in a phase
(:func:`mmoe.parallel.calls.phase`). A wait for ranks that are all in one, or left it less than ``limit`` ago, is
reported after ``10 * limit`` only.
A rank that is stopped or dead does not publish, phase or not, and is named after ``limit``.

On CUDA a collective returns at once, and a rank that is held up stands still at the next synchronisation with the
device. There the rank counts as waiting while its main thread does not move, for the first call that another
member has not enqueued. Calls that all have enqueued and that hang on the device are for NCCL's own watchdog and flight
recorder, which are left as they are.

Where the store does not answer (a launcher that is not torchrun keeps it in rank 0, which may be the one that is
stopped), each rank that waits ``1.5 * limit`` says so for itself.

A rank that is gone for good (:mod:`mmoe.parallel.peers`) ends the job. Who loses a connection to it looks for the
reason at once (:func:`guard`); a rank that waits on a device, or for a host that went without closing connections,
loses none: there the silence is noticed here, and a process whose main thread does not end by itself is ended.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed import distributed_c10d

from mmoe import ending
from mmoe.errors import Interrupted, RankLost, UserError
from mmoe.parallel import calls
from mmoe.parallel.peers import End, Peers
from mmoe.parallel.stalls import Entry, Record, judge, only_ahead, show_ranks

THREAD = "the watchdog"
SILENT_INTERVALS = 3
"""A rank that has not published for so many intervals is silent."""
GRACE_SECONDS = 20.0
"""From the news that a rank is gone until a process ends whose main thread has not noticed."""
OTHERS_SECONDS = 10.0
"""For how long the rank that keeps the store waits, when it ends, for those that look for the reason in it."""


class Watchdog(threading.Thread):
    """One rank's part; ``blocking`` says that a call does not return before its collective is done (not so on CUDA)."""

    def __init__(self, peers: Peers, store: Any, limit: float, blocking: bool) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.peers, rank, world = peers, peers.rank, peers.world
        self.store = PrefixStore("watchdog", store.clone())
        self.rank, self.world, self.limit, self.blocking = rank, world, limit, blocking
        self.interval = min(5.0, limit / 4)
        self.store.set_timeout(timedelta(seconds=max(limit, 10.0)))
        self.leaving = threading.Event()
        self.beats = 0
        self.heard: dict[int, tuple[bytes, float]] = {}
        self.told: set[str] = set()
        self.still: tuple[Any, float] = (None, 0.0)
        self.answered = time.monotonic()
        self.said = False
        self.alone = threading.Thread(target=self._alone, name="watchdog alone", daemon=True)

    def run(self) -> None:
        self.alone.start()
        try:
            self._publish(Record(at="the start"))
            while not self.leaving.wait(self.interval):
                self._publish(self._record())
                self._look()
                self.answered = time.monotonic()
                if end := self.peers.told():
                    self._end(end)
            self._publish(Record(at="the end of its run"))
            self.peers.leave_word("")
        except RuntimeError:
            # The store's host has ended: rank 0's, or an agent's.
            if not self.leaving.is_set() and (end := self.peers.without_store(self._seen_by(THREAD))):
                self._end(end)

    def _seen_by(self, where: str) -> str:
        return f"rank {self.rank} noticed it in {where}; start again with --resume"

    def _end(self, end: End) -> None:
        """Ends the process, unless its main thread ends by itself meanwhile."""
        if end.tell:
            ending.say(f"mmoe: {end.text}")
        if not self.leaving.wait(GRACE_SECONDS):
            # The list may lie where the lost host was, too.
            threading.Thread(
                target=ending.enter, args=(self.rank, end.status, end.text), kwargs={"tell": end.tell}, daemon=True
            ).start()
            time.sleep(1)
            os._exit(end.status)

    def end_after(self, error: BaseException) -> RankLost | None:
        """What to raise in the place of ``error``; None where it is this rank's own, which the others get to know."""
        if calls.broken or _of_a_connection(error):
            end = self.peers.search(self._seen_by(calls.show(calls.raised_in(error))))
            if end is not None:
                with suppress(RuntimeError):
                    self.peers.leave_word("")
                    self.peers.wait_for_the_others(OTHERS_SECONDS)
                return end.error()
        first = str(error).partition("\n")[0]
        with suppress(RuntimeError):
            if isinstance(error, UserError):
                error.tell = self.peers.first_to_say(str(error))
            status = ending.USER_ERROR if isinstance(error, UserError) else ending.DEFECT
            self.peers.leave_word(f"{type(error).__name__}: {first}", status)
            self.peers.wait_for_the_others(OTHERS_SECONDS)
        return None

    def stop(self) -> None:
        self.leaving.set()
        self.join(timeout=2 * self.interval)
        self.peers.close()

    def _alone(self) -> None:
        """What can be said, and done, while the other thread is held up by the store."""
        look_after = SILENT_INTERVALS
        while self.is_alive() and not self.leaving.wait(self.interval):
            quiet = time.monotonic() - self.answered
            if quiet > look_after * self.interval:
                if end := self.peers.without_store(self._seen_by(THREAD)):
                    self._end(end)
                look_after *= 2  # who is only stopped must not drown in questions
            waits = self._record().waits
            if quiet > self.limit and waits and waits[0][1] > 1.5 * self.limit and not self.said:
                entry, seconds = waits[0]
                self.said = True
                self._print(
                    f"rank {self.rank} has waited {seconds:.0f} s in {entry.text} of {entry.title} "
                    f"({show_ranks(entry.ranks)}) at {entry.site}; of the others nothing is known: "
                    "the job's store does not answer, its host is stopped or dead"
                )

    def _print(self, line: str) -> None:
        ending.say(f"mmoe: watchdog: {line}")

    def _publish(self, record: Record) -> None:
        self.beats += 1
        longest = max((seconds for _, seconds in record.waits), default=0.0)
        self.store.set(f"record {self.rank}", record.dump())
        self.store.set(f"beat {self.rank}", f"{self.beats} {longest:.3f}")

    def _record(self) -> Record:
        now = time.perf_counter()
        entered = {key: Entry.of(call) for key, call in calls.entered.copy().items()}
        waits = [(Entry.of(call), now - since) for call, since in list(calls.waiting.values())]
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        standing = self._standing(frame, now)
        if not self.blocking and not waits and entered:
            waits = [(entry, standing) for entry in entered.values()]
        phase = calls.current_phase(now - self.limit)
        return Record(
            entered,
            waits,
            calls.show(calls.position(frame)) if frame else "no main thread",
            (phase[0], now - phase[1]) if phase else None,
        )

    def _standing(self, frame: FrameType | None, now: float) -> float:
        """For how long the main thread has been seen at the same instruction, with no call entered."""
        entered = sum(call.sequence for call in calls.entered.copy().values())
        place = (id(frame), frame.f_lasti if frame else 0, entered)
        if place != self.still[0]:
            self.still = place, now
        return now - self.still[1]

    def _look(self) -> None:
        """Reads the others and prints, if this is the lowest rank that answers."""
        keys = [f"beat {rank}" for rank in range(self.world)]
        for rank in range(self.rank):
            if not self._silent([rank], [keys[rank]]):
                return
        if not self.store.check(keys):
            return
        silent = self._silent(list(range(self.world)), keys)
        if silent and (end := self.peers.lost(silent, self._seen_by(THREAD))):
            self._end(end)
        ranks = [rank for rank, (beat, _) in self.heard.items() if _longest(beat) >= self.limit]
        if not ranks:
            self.told.clear()
            return
        records = self._read(ranks)
        members = {m for record in records.values() for entry, _ in record.waits for m in entry.ranks}
        records |= self._read(sorted(members - records.keys()))
        if not self.blocking:
            records = {rank: only_ahead(record, records) for rank, record in records.items()}
        verdict = judge(records, silent, self.limit)
        if verdict is not None and not verdict[1] <= self.told:
            self.told |= verdict[1]
            self._print(verdict[0])

    def _read(self, ranks: list[int]) -> dict[int, Record]:
        texts = self.store.multi_get([f"record {rank}" for rank in ranks]) if ranks else []
        return {rank: Record.load(text) for rank, text in zip(ranks, texts, strict=True)}

    def _silent(self, ranks: list[int], keys: list[str]) -> dict[int, float]:
        """Seconds since those of ``ranks`` were heard of that do not answer any more."""
        now = time.monotonic()
        beats = self.store.multi_get(keys) if self.store.check(keys) else [b""] * len(keys)
        for rank, beat in zip(ranks, beats, strict=True):
            if self.heard.get(rank, (None, 0.0))[0] != beat:
                self.heard[rank] = beat, now
        quiet = {rank: now - self.heard[rank][1] for rank in ranks}
        return {rank: seconds for rank, seconds in quiet.items() if seconds > SILENT_INTERVALS * self.interval}


def _longest(beat: bytes) -> float:
    return float(beat.split()[1]) if b" " in beat else 0.0


def _of_a_connection(error: BaseException) -> bool:
    """Whether a process group failed outside of a collective: while groups are made, which ``calls`` does not see."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


_watchdog: Watchdog | None = None


def start(limit: float, blocking: bool, seconds: float = 600.0) -> None:
    """Watches this process's ranks from now on; does nothing where there is one rank alone.

    Raises:
        RankLost: ranks have not come within ``seconds``.
    """
    global _watchdog
    calls.reset()
    rank, world = dist.get_rank(), dist.get_world_size()
    if world > 1 and _watchdog is None:
        store: Any = distributed_c10d._get_default_store()
        _watchdog = Watchdog(Peers(store, rank, world, seconds), store, limit, blocking)
        _watchdog.start()


def stop() -> None:
    """Ends the watch; must come before the process groups are destroyed. Safe to call twice."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.stop()
        _watchdog = None


@contextmanager
def guard() -> Iterator[None]:
    """Work of all ranks together.

    Raises:
        RankLost: it failed because another rank is gone or ended by an error. An error of this rank's own goes through,
            and the others end after it.
    """
    try:
        yield
    except (Interrupted, RankLost, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        lost = _watchdog.end_after(error) if _watchdog else None
        if lost is None:
            raise
        raise lost from None
