"""torch.distributed.run with the ranks' own exit status and without its traceback over the ranks' own message.

The agent turns every failure into exit status 1 and, on a signal, loses the status altogether. So each rank enters what
it ended with into the file that `MMOE_STATUS_FILE` names (`mmoe.cli`), and the first entry decides.
"""

import json
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

INTERRUPTED = 75


def main(ranks: str, arguments: list[str]) -> int:
    """Run `mmoe ARGUMENTS` on that many ranks of this machine; the exit status of them all."""
    # Only this process: the ranks have loggers of their own.
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="mmoe-") as folder:
        statuses = Path(folder) / "statuses"
        statuses.touch()
        os.environ["MMOE_STATUS_FILE"] = str(statuses)
        try:
            run.run(run.parse_args(["--standalone", "--nproc-per-node", ranks, "--module", "mmoe", *arguments]))
            return 0
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            code = failure.exitcode
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            silent, message = 1, f"mmoe: rank {rank} {how} and left no message"
        except SignalException as error:
            silent, message = 128 + error.sigval, f"mmoe: stopped by {error.sigval.name} before anything could be saved"
        ended = [json.loads(line)["status"] for line in statuses.read_text(encoding="utf-8").splitlines()]
    failed = [status for status in ended if status != INTERRUPTED]
    if not ended:
        print(message, file=sys.stderr)
    return (failed or ended or [silent])[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
