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
"""

import json
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed import distributed_c10d

from mmoe.parallel import calls
from mmoe.parallel.calls import Call

PHASE_LIMITS = 10
"""How many limits a phase may take."""
SILENT_INTERVALS = 3
"""A rank that has not published for so many intervals is silent."""
NAMED = 8
"""Ranks that a line names one by one."""
UNIFORM = {"all_reduce", "reduce", "broadcast", "all_gather_single", "reduce_scatter_single"}
"""Every member's tensor has the same shape and dtype."""


@dataclass(frozen=True)
class Entry:
    """A call as another rank needs to know it."""

    group: str
    title: str
    ranks: list[int]
    sequence: int
    name: str
    text: str
    site: str

    @staticmethod
    def of(call: Call) -> "Entry":
        shape = "" if call.shape is None else f" {str(call.dtype).removeprefix('torch.')} {list(call.shape)}"
        group = call.group
        text = f"{call.name} #{call.sequence}{shape}"
        site = calls.show(call.sites)
        return Entry(group.key, group.title, list(group.ranks), call.sequence, call.name, text, site)


@dataclass(frozen=True)
class Record:
    """What a rank says of itself; times in seconds up to now."""

    entered: dict[str, Entry] = field(default_factory=dict)
    waits: list[tuple[Entry, float]] = field(default_factory=list)
    at: str = ""
    phase: tuple[str, float] | None = None

    def dump(self) -> str:
        return json.dumps(
            {
                "entered": [vars(entry) for entry in self.entered.values()],
                "waits": [(vars(entry), seconds) for entry, seconds in self.waits],
                "at": self.at,
                "phase": self.phase,
            }
        )

    @staticmethod
    def load(text: bytes) -> "Record":
        read = json.loads(text)
        entries = [Entry(**entry) for entry in read["entered"]]
        return Record(
            {entry.group: entry for entry in entries},
            [(Entry(**entry), seconds) for entry, seconds in read["waits"]],
            read["at"],
            read["phase"] and tuple(read["phase"]),
        )

    def sequence(self, group: str) -> int:
        return self.entered[group].sequence if group in self.entered else 0


@dataclass(frozen=True)
class Stall:
    """A call that somebody waits for."""

    entry: Entry
    waiting: list[int]
    seconds: float
    behind: list[int]
    """Members that have not entered it."""
    others: list[int]
    """Members that entered another call in its place."""
    silent: list[int]

    @property
    def culprits(self) -> set[int]:
        return {*self.behind, *self.others, *self.silent}


def stalls(records: dict[int, Record], silent: dict[int, float]) -> list[Stall]:
    """Every call that a rank waits for, the ones waited for longest first."""
    found: dict[tuple[str, int], Stall] = {}
    for rank, record in records.items():
        for entry, _ in record.waits:
            key = entry.group, entry.sequence
            known = found.get(key)
            waiting = [*(known.waiting if known is not None and not known.others else []), rank]
            members = {member: records[member] for member in entry.ranks if member in records}
            behind = [member for member, other in members.items() if other.sequence(entry.group) < entry.sequence]
            others = [member for member, other in members.items() if _differs(other, entry)]
            stopped = [member for member in entry.ranks if member in silent]
            times = [t for m in members.values() for e, t in m.waits if (e.group, e.sequence) == key]
            # One that all have entered runs since the last did so; who does not wait for it any more has its result.
            running = min(times) if len(times) == len(members) else 0.0
            seconds = max(times) if behind or others or stopped else running
            found[key] = Stall(entry, waiting, seconds, behind, others, stopped)
    return sorted(found.values(), key=lambda stall: -stall.seconds)


def _differs(record: Record, entry: Entry) -> bool:
    other = record.entered.get(entry.group)
    if other is None or other.sequence != entry.sequence:
        return False
    return other.name != entry.name or (entry.name in UNIFORM and other.text != entry.text)


def judge(records: dict[int, Record], silent: dict[int, float], limit: float) -> tuple[str, set[str]] | None:
    """The line that tells of the stall which holds up the others, and the groups whose ranks have waited too long.

    records: what the ranks said last; silent: seconds since the ranks that do not answer have been heard of.
    """
    found = stalls(records, silent)
    excused = _excused(found, records, silent, PHASE_LIMITS * limit)
    late = [stall for stall in found if stall.seconds >= limit and not (stall.culprits and stall.culprits <= excused)]
    if not late:
        return None
    # A rank that itself waits in another collective is not the one to look at.
    waiting = {rank for stall in found for rank in stall.waiting}
    roots = [stall for stall in late if stall.culprits - waiting or stall.others]
    return _line((roots or late)[0], records, silent), {stall.entry.group for stall in late}


def _excused(found: list[Stall], records: dict[int, Record], silent: dict[int, float], longest: float) -> set[int]:
    """Ranks in a phase that is not too long, and those that wait for none but them."""
    ranks = {r for r, record in records.items() if r not in silent and record.phase and record.phase[1] < longest}
    while True:
        more = {r for stall in found if stall.culprits and stall.culprits <= ranks for r in stall.waiting} - ranks
        if not more:
            return ranks
        ranks |= more


def _line(stall: Stall, records: dict[int, Record], silent: dict[int, float]) -> str:
    entry = stall.entry
    parts = [
        f"{_ranks(stall.waiting)} {'has' if len(stall.waiting) == 1 else 'have'} waited {stall.seconds:.0f} s in "
        f"{entry.text} of {entry.title} ({_ranks(entry.ranks)}) at {entry.site}"
    ]
    for rank in sorted(stall.culprits)[:NAMED]:
        record = records.get(rank, Record())
        there = record.entered.get(entry.group)
        if rank in stall.others and there is not None:
            parts.append(f"rank {rank} entered {there.text} instead, at {there.site}")
        elif rank in silent:
            parts.append(f"rank {rank} is stopped or dead: not heard of for {silent[rank]:.0f} s, was at {record.at}")
        else:
            parts.append(f"rank {rank} has not entered it: {_instead(record)}")
    if len(stall.culprits) > NAMED:
        parts.append(f"{len(stall.culprits) - NAMED} more ranks have not either")
    return "; ".join(parts if stall.culprits else [*parts, "all of them have entered it"])


def _instead(record: Record) -> str:
    if record.waits:
        entry, seconds = record.waits[0]
        return f"waits {seconds:.0f} s in {entry.text} of {entry.title} at {entry.site}"
    phase = f"{record.phase[0]} for {record.phase[1]:.0f} s, " if record.phase else ""
    return f"{phase}at {record.at}"


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(map(str, ranks[:NAMED]))
    return f"ranks {shown}" + (f", … {len(ranks)} in all" if len(ranks) > NAMED else "")


class Watchdog(threading.Thread):
    """One rank's part; ``blocking`` says that a call does not return before its collective is done (not so on CUDA)."""

    def __init__(self, store: Any, rank: int, world: int, limit: float, blocking: bool) -> None:
        super().__init__(name="watchdog", daemon=True)
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
        self.alone = threading.Thread(target=self._alone, name="watchdog alone", daemon=True)

    def run(self) -> None:
        self.alone.start()
        try:
            self._publish(Record(at="the start"))
            while not self.leaving.wait(self.interval):
                self._publish(self._record())
                self._look()
                self.answered = time.monotonic()
            self._publish(Record(at="the end of its run"))
        except RuntimeError:
            # The store's host has ended, and the job with it.
            return

    def stop(self) -> None:
        self.leaving.set()
        self.join(timeout=2 * self.interval)

    def _alone(self) -> None:
        """What can be said while the other thread is held up by the store."""
        while self.is_alive() and not self.leaving.wait(self.interval):
            waits = self._record().waits
            if time.monotonic() - self.answered > self.limit and waits and waits[0][1] > 1.5 * self.limit:
                entry, seconds = waits[0]
                self._print(
                    f"rank {self.rank} has waited {seconds:.0f} s in {entry.text} of {entry.title} "
                    f"({_ranks(entry.ranks)}) at {entry.site}; of the others nothing is known: "
                    "the job's store does not answer, its host is stopped or dead"
                )
                return

    def _print(self, line: str) -> None:
        print(f"mmoe: watchdog: {line}", file=sys.stderr, flush=True)

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
        ranks = [rank for rank, (beat, _) in self.heard.items() if _longest(beat) >= self.limit]
        if not ranks:
            self.told.clear()
            return
        records = self._read(ranks)
        members = {m for record in records.values() for entry, _ in record.waits for m in entry.ranks}
        records |= self._read(sorted(members - records.keys()))
        if not self.blocking:
            records = {rank: _only_ahead(record, records) for rank, record in records.items()}
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


def _only_ahead(record: Record, records: dict[int, Record]) -> Record:
    """Of the calls that a standing main thread may wait for, those that another member has not entered."""
    ahead = [
        (entry, seconds)
        for entry, seconds in record.waits
        if any(records[member].sequence(entry.group) < entry.sequence for member in entry.ranks if member in records)
    ]
    return Record(record.entered, ahead, record.at, record.phase)


_watchdog: Watchdog | None = None


def start(limit: float, blocking: bool) -> None:
    """Watches this process's ranks from now on; does nothing where there is one rank alone."""
    global _watchdog
    calls.reset()
    rank, world = dist.get_rank(), dist.get_world_size()
    if world > 1 and _watchdog is None:
        _watchdog = Watchdog(distributed_c10d._get_default_store(), rank, world, limit, blocking)
        _watchdog.start()


def stop() -> None:
    """Ends the watch; must come before the process groups are destroyed. Safe to call twice."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.stop()
        _watchdog = None
