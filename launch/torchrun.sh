#!/usr/bin/env bash
# launch/torchrun.sh N ARGS…   runs `mmoe ARGS` on N ranks of this machine through torch.distributed.run.
#
# On several hosts, run it on each of them:
#   NNODES=2 MASTER_ADDR=host1 launch/torchrun.sh 8 train RECIPE --out RUN
# NNODES=MIN:MAX goes on with MIN hosts or more when one is gone for good. What else the environment says, exit statuses
# and restarts: launch/README.md.
# SIGTERM goes to every rank, which then has TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (55) to save and end.
# PYTHON_BIN names the interpreter (.venv/bin/python); OMP_NUM_THREADS defaults to cores / N.
set -euo pipefail

if [[ ! ${1:-} =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launch/torchrun.sh N ARGS…   (N ranks; ARGS as after \`mmoe\`, for example: 2 train quickstart)" >&2
    exit 2
fi
ranks=$1
shift
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "$ranks"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-55}
exec "$python" "$here/attempts.py" "$python" "$here/elastic.py" "$ranks" -- "$@"
