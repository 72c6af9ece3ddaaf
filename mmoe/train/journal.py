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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FILE = "events.jsonl"


class Journal:
    """Writes on the first rank only."""

    def __init__(self, run: Path, first_rank: bool) -> None:
        self.path = run / FILE if first_rank else None
        self.started, self.step = False, 0
        """The last step done, for the end."""

    def start(self, *, step: int, **fields: Any) -> None:
        self.started, self.step = True, step
        self.add("start", step=step, **fields)

    @contextmanager
    def until_the_end(self) -> Iterator[None]:
        """Enters how what is done in it ended, if it got to its start; a full disk does not hide the reason."""
        how, why = "done", ""
        try:
            yield
        except BaseException as error:
            how, why = type(error).__name__.lower(), str(error).partition("\n")[0]
            raise
        finally:
            if self.started:
                with suppress(OSError):
                    self.add("end", step=self.step, how=how, why=why)

    def add(self, event: str, **fields: Any) -> None:
        if self.path is not None:
            with self.path.open("a+b") as file:
                # What a full disk or a lost host left of a line ends here.
                torn = file.tell() and not self.path.read_bytes().endswith(b"\n")
                line = json.dumps({"time": round(time.time(), 3), "event": event, **fields})
                file.write(f"{chr(10) if torn else ''}{line}\n".encode())
