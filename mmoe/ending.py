"""How a process ends: its exit status, the line that it says, and the launcher's list of how each rank ended."""

import fcntl
import json
import os
import sys
import time
from contextlib import suppress
from typing import Any, TextIO

DONE, DEFECT, USER_ERROR, LOST, INTERRUPTED, KEYBOARD = 0, 1, 2, 69, 75, 130
"""Done; a defect of ours; the user can mend it; another rank is gone; interrupted and saved; Ctrl-C."""
LOCK_SECONDS = 10.0
LONGEST = 2000
"""Characters of a message that are printed."""


def enter(rank: int, status: int, message: str, *, tell: bool) -> list[dict[str, Any]]:
    """Enter this rank's end in the launcher's list, `MMOE_STATUS_FILE`, and whether it says so itself; returns the
    entries before it, none without a list."""
    path = os.environ.get("MMOE_STATUS_FILE")
    known: list[dict[str, Any]] = []
    if not path:
        return known
    # Where the list cannot be written or locked, the exit status has to do: no end may hang or fail for it.
    with suppress(OSError), open(path, "a+", encoding="utf-8") as file:
        _lock(file)
        file.seek(0)
        known = [json.loads(line) for line in file if line.endswith("}\n")]
        file.write(json.dumps({"rank": rank, "status": status, "message": message, "tell": tell}) + "\n")
    return known


def _lock(file: TextIO) -> None:
    """Raises OSError where that takes too long."""
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)


def say(line: str) -> None:
    """``line`` on stderr in one write: print() makes two where Python runs unbuffered, as under torchrun, and lines of
    several ranks would mix."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def one_line(value: object) -> str:
    """One line that a terminal shows and does nothing else with: messages quote names out of other people's files."""
    text = " ".join(str(value).split())
    shown = "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text[:LONGEST])
    return shown if len(text) <= LONGEST else f"{shown}… ({len(text)} characters)"
