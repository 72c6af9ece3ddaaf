#!/usr/bin/env bash
# launch/torchrun.sh N ARGS…   runs `mmoe ARGS` on N ranks of this machine through torch.distributed.run.
#
# Exit status: that of the first rank that failed (1 a defect, 2 the user can mend it), 75 interrupted and saved.
# SIGTERM goes to every rank, which then has TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (55) to save and end.
# PYTHON_BIN names the interpreter (.venv/bin/python); OMP_NUM_THREADS defaults to cores / N.
set -euo pipefail

if [[ ! ${1:-} =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launch/torchrun.sh N ARGS…   (N ranks; ARGS as after \`mmoe\`, for example: 2 train quickstart)" >&2
    exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON_BIN:-$here/../.venv/bin/python}
if ! command -v "$python" > /dev/null; then
    echo "torchrun.sh: no Python at $python: run \`make build\`, or name one with PYTHON_BIN" >&2
    exit 2
fi
threads=$(($(nproc) / $1))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-55}
exec "$python" "$here/elastic.py" "$@"
