# shellcheck shell=bash
# source environment.sh N   sets here (this folder) and python, exports OMP_NUM_THREADS; N: the ranks of a host.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON_BIN:-$here/../.venv/bin/python}
if ! command -v "$python" > /dev/null; then
    echo "${0##*/}: no Python at $python: run \`make build\`, or name one with PYTHON_BIN" >&2
    exit 2
fi
threads=$(($(nproc) / $1))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
