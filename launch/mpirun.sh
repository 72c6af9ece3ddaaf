#!/usr/bin/env bash
# launch/mpirun.sh N ARGS…   runs `mmoe ARGS` on N ranks of this machine through mpirun, Open MPI's or MPICH's.
#
# On several hosts, N ranks each, run it once, on the first of them:
#   HOSTS="host1 host2" launch/mpirun.sh 8 train RECIPE --out RUN
# NNODES=MIN:MAX goes on without hosts that no longer answer, as long as MIN of them do. What else the environment says,
# exit statuses and restarts: launch/README.md.
# MPIRUN names the program, MPIRUN_FLAGS holds further flags for it, MMOE_RSH replaces ssh.
# SIGTERM to this script lets every rank save and end. PYTHON_BIN names the interpreter (.venv/bin/python).
set -euo pipefail

if [[ ! ${1:-} =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launch/mpirun.sh N ARGS…   (N ranks; ARGS as after \`mmoe\`, for example: 2 train quickstart)" >&2
    exit 2
fi
ranks=$1
shift
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "$ranks"
export MMOE_STOP_SIGNAL=SIGUSR1 MMOE_NEEDS_WORD=1
exec "$python" "$here/attempts.py" "$python" "$here/mpi.py" "$ranks" -- "$@"
