"""What became of a run's time: the share that steps which count took, and what restarts and checkpoints cost."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Start:
    """One process of a run, from the ``start`` in events.jsonl to the next one or to the run's end."""

    time: float
    """Seconds since 1970."""
    step: int
    """The last one done before."""
    ranks: int
    hosts: list[str]
    lost_steps: int
    """Done by the process before, behind its last checkpoint, and done again."""
    lost_seconds: float
    before: str
    """How the process before ended, empty for the first one."""


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """Seconds; ``wall`` runs from the first start to the end."""

    wall: float
    steps: float
    """In steps that count: the last time that each was done."""
    lost: float
    """In steps that were done again."""
    checkpoints: float
    """That the training stood still for checkpoints."""
    starts: list[Start]

    @property
    def share(self) -> float:
        return self.steps / self.wall if self.wall else 0.0


def account(events: list[dict[str, Any]], rows: list[dict[str, Any]], until: float) -> Goodput | None:
    """Of events.jsonl (mmoe.train.journal) and metrics.jsonl; ``until``: when something was last written, in seconds
    since 1970. None for a run without events."""
    starts: list[Start] = []
    ended = ""
    for event in events:
        if event["event"] == "end":
            ended = f"{event['how']}{': ' if event['why'] else ''}{event['why']}"
        elif event["event"] == "start":
            fields = {name: event[name] for name in ("time", "step", "ranks", "hosts", "lost_steps", "lost_seconds")}
            starts.append(Start(**fields, before=(ended or "killed") if starts else ""))
            ended = ""
    if not starts:
        return None
    return Goodput(
        wall=max(until, *(event["time"] for event in events)) - starts[0].time,
        steps=sum(row["seconds"] for row in rows),
        lost=sum(start.lost_seconds for start in starts),
        checkpoints=sum(event["stall"] for event in events if event["event"] == "checkpoint"),
        starts=starts,
    )
