"""The attempts of one run: a failed one is followed by another, a bounded number of times.

    attempts.py COMMAND… -- ARGS…   runs `COMMAND… ARGS…`, which starts `mmoe ARGS` on all ranks, until it is done.

The same for every launcher; launch/README.md has the contract.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

from mmoe.ending import DEFECT, DONE, INTERRUPTED, KEYBOARD, LOST, USER_ERROR, say

MEANING = {DEFECT: "a defect", LOST: "another rank was lost"}
KILL_SECONDS = 30.0
POLL_SECONDS = 0.1


class Attempts:
    """The attempts of one run, and the signals that end them."""

    def __init__(self, command: list[str], arguments: list[str], statuses: Path) -> None:
        self.command, self.arguments, self.statuses = command, arguments, statuses
        training = arguments[:1] == ["train"]
        self.restarts = int(os.environ.get("MMOE_RESTARTS", "3" if training else "0"))
        self.backoff = float(os.environ.get("MMOE_BACKOFF", "10"))
        self.grace = float(os.environ.get("MMOE_GRACE", "120"))
        self.number = int(os.environ.get("MMOE_ATTEMPT", "0"))
        # Open MPI 5 ends with status 0 when it has lost a host.
        self.needs_word = os.environ.get("MMOE_NEEDS_WORD") == "1"
        # Hosts that come and go with a run are started at different times, and any of them may get rank 0.
        self.elastic = ":" in os.environ.get("NNODES", "")
        # mpirun and srun hand this one on to the ranks; SIGTERM would have them killed.
        self.stop_signal = signal.Signals[os.environ.get("MMOE_STOP_SIGNAL", "SIGTERM")]
        self.process: subprocess.Popen[bytes] | None = None
        self.stopped = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)

    def stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self.process:
            self.process.send_signal(self.stop_signal)

    def run(self) -> int:
        """The exit status of the last attempt."""
        for left in range(self.restarts, -1, -1):
            status = self.once()
            if self.stopped or status in (DONE, USER_ERROR, INTERRUPTED, KEYBOARD) or not self.restarts:
                return status
            ended = f"mmoe: attempt {self.number} ended with status {status}{meaning(status)}"
            if not left:
                say(f"{ended}: MMOE_RESTARTS={self.restarts} restarts are used up")
                return status
            wait = self.backoff * 2 ** (self.restarts - left)
            say(f"{ended}: restarting in {wait:g} s, {left} of {self.restarts} restarts left")
            end = time.monotonic() + wait
            while time.monotonic() < end:
                if self.stopped:
                    return status
                time.sleep(POLL_SECONDS)
            self.number += 1
        raise AssertionError("the last attempt returns")

    def once(self) -> int:
        """One attempt's exit status: that of the first rank that failed, where the ranks could leave theirs."""
        self.statuses.write_text("")
        resumes = (self.number or self.elastic) and self.arguments[:1] == ["train"]
        variables = {"MMOE_ATTEMPT": str(self.number), "MMOE_STATUS_FILE": str(self.statuses)}
        # A group of its own: a terminal's Ctrl-C must come once, from here.
        self.process = subprocess.Popen(
            [*self.command, *self.arguments, *(["--resume"] if resumes else [])],
            env=os.environ | variables,
            process_group=0,
        )
        if self.stopped:
            self.process.send_signal(self.stop_signal)
        try:
            code = self.finish(self.process)
        finally:
            self.process.kill()  # where it has not ended
        self.process = None
        ended = self.ended()
        if code == 0:
            # Ranks may have been interrupted so that others could join them.
            return DONE if DONE in ended or not self.needs_word else LOST
        failed = [status for status in ended if status not in (DONE, INTERRUPTED)]
        interrupted = [status for status in ended if status == INTERRUPTED]
        return (failed or interrupted or [128 - code if code < 0 else code])[0]

    def finish(self, process: "subprocess.Popen[bytes]") -> int:
        """Waits for the attempt's end, and brings it about where a rank has failed and the others do not notice: not
        every mpirun ends its ranks when one of them has."""
        failed_at, asked = None, False
        while (code := process.poll()) is None:
            time.sleep(POLL_SECONDS)
            if failed_at is None and set(self.ended()) - {DONE, INTERRUPTED}:
                failed_at = time.monotonic()
            late = time.monotonic() - failed_at - self.grace if failed_at is not None else 0.0
            if late > KILL_SECONDS:
                process.kill()
            elif late > 0 and not asked:
                asked = True
                process.terminate()
        return code

    def ended(self) -> list[int]:
        return [entry["status"] for entry in entries(self.statuses)]


def entries(statuses: Path) -> list[dict[str, Any]]:
    """The ranks' ends; a line that is still being written is read the next time."""
    try:
        lines = statuses.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, ValueError):
        return []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def meaning(status: int) -> str:
    if status - 128 in signal.valid_signals():
        return f" ({signal.Signals(status - 128).name})"
    return f" ({MEANING[status]})" if status in MEANING else ""


def main(words: list[str]) -> int:
    cut = words.index("--")
    with tempfile.TemporaryDirectory(prefix="mmoe-") as folder:
        statuses = Path(os.environ.get("MMOE_STATUS_FILE") or Path(folder) / "statuses")
        try:
            return Attempts(words[:cut], words[cut + 1 :], statuses).run()
        finally:
            statuses.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
