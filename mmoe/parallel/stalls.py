"""Whose fault a stall is: what every rank says of itself in, one line about the rank that holds up the others out."""

import json
from dataclasses import dataclass, field

from mmoe.parallel import calls
from mmoe.parallel.calls import Call

PHASE_LIMITS = 10
"""How many limits a phase may take."""
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
        f"{show_ranks(stall.waiting)} {'has' if len(stall.waiting) == 1 else 'have'} waited {stall.seconds:.0f} s in "
        f"{entry.text} of {entry.title} ({show_ranks(entry.ranks)}) at {entry.site}"
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


def show_ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(map(str, ranks[:NAMED]))
    return f"ranks {shown}" + (f", … {len(ranks)} in all" if len(ranks) > NAMED else "")


def only_ahead(record: Record, records: dict[int, Record]) -> Record:
    """Of the calls that a standing main thread may wait for, those that another member has not entered."""
    ahead = [
        (entry, seconds)
        for entry, seconds in record.waits
        if any(records[member].sequence(entry.group) < entry.sequence for member in entry.ranks if member in records)
    ]
    return Record(record.entered, ahead, record.at, record.phase)
