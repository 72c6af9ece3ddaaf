"""One attempt through torch.distributed.run, without its traceback over the ranks' own message.

    elastic.py N ARGS…   runs `mmoe ARGS` on N ranks of this host, and of the others that NNODES counts.

The agent turns every failure into exit status 1 and, on a signal, loses the status altogether; each rank enters its own
into the file that MMOE_STATUS_FILE names (`mmoe.cli`), which `attempts.py` reads.
"""

import logging
import os
import signal
import sys
from pathlib import Path

from attempts import entries
from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from mmoe.ending import DEFECT, LOST, USER_ERROR, say


def rendezvous(variables: "os._Environ[str]") -> list[str]:
    """How the agents of the hosts find each other.

    Raises:
        KeyError: several hosts are to meet, and no MASTER_ADDR says where.
    """
    if variables.get("NNODES", "1") == "1":
        return ["--standalone"]
    settings = [f"join_timeout={variables.get('MMOE_JOIN', '600')}"]
    settings += [f"last_call_timeout={variables.get('MMOE_LAST_CALL', '30')}"]
    # Without it the agent guesses by host names whether it is the one that the others meet at.
    settings += [f"is_host={int(variables['NODE_RANK'] == '0')}"] if "NODE_RANK" in variables else []
    endpoint = f"{variables['MASTER_ADDR']}:{variables.get('MASTER_PORT', '29400')}"
    options = ["--nnodes", variables["NNODES"], "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    options += ["--rdzv-id", "mmoe", "--rdzv-conf", ",".join(settings)]
    return options + (["--local-addr", variables["LOCAL_ADDR"]] if "LOCAL_ADDR" in variables else [])


def main(ranks: str, arguments: list[str]) -> int:
    # Only this process: the ranks have loggers of their own.
    logging.disable(logging.ERROR)
    try:
        options = rendezvous(os.environ)
    except KeyError:
        say("mmoe: NNODES without MASTER_ADDR: set it to the address of one of the hosts")
        return USER_ERROR
    try:
        run.run(run.parse_args([*options, "--nproc-per-node", ranks, "--module", "mmoe", *arguments]))
        return 0
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        silent, status, message = {rank}, DEFECT, f"rank {rank} {how} and left no message"
    except SignalException as error:
        silent, status = set(), 128 + error.sigval
        message = f"stopped by {error.sigval.name} before anything could be saved"
    except RendezvousError as error:
        silent, status = set(), LOST
        message = f"the hosts did not meet at {os.environ.get('MASTER_ADDR')} ({type(error).__name__})"
    ended = entries(Path(os.environ["MMOE_STATUS_FILE"]))
    told = {entry["rank"] for entry in ended}
    named = any(entry["status"] == LOST and entry["tell"] for entry in ended)
    if not told or (silent - told and not named):
        say(f"mmoe: {message}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
