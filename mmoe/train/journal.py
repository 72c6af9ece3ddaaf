"""DIR/events.jsonl: when a run started, on what, what it lost, how long its checkpoints held it up, how it ended.

One JSON object a line, with ``time`` in seconds since 1970 by the first rank's clock:

    start       step (the last one done before), ranks, hosts, attempt (of the launcher), lost_steps and lost_seconds
                (done after that step by the process before, and done again by this one)
    checkpoint  step, stall (seconds that the training stood still), seconds (until it was whole), bytes
    end         step, how ("done", "interrupted", or the name of an error), why (its first line)

A process that is killed leaves no end.
"""

import json
import time
from pathlib import Path
from typing import Any

FILE = "events.jsonl"


class Journal:
    """Writes on the first rank only."""

    def __init__(self, run: Path, first_rank: bool) -> None:
        self.path = run / FILE if first_rank else None

    def add(self, event: str, **fields: Any) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": round(time.time(), 3), "event": event, **fields}) + "\n")
