# shellcheck shell=bash
# source story.sh   what the scripts share that tell a whole story: it changes to the checkout, finds the interpreter, sets
# ranks (2, or 1 on a single core), and defines the parts. Data lies in MMOE_DATA (data-cache), PYTHON_BIN names the
# interpreter (.venv/bin/python).
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

export PYTHON_BIN=${PYTHON_BIN:-.venv/bin/python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# shellcheck disable=SC2034  # read by the script that sources this
ranks=$(($(nproc) > 1 ? 2 : 1))
if ! command -v "$PYTHON_BIN" > /dev/null; then
    echo "${0##*/}: no Python at $PYTHON_BIN: run \`make build\`, or name one with PYTHON_BIN" >&2
    exit 2
fi

mmoe() { "$PYTHON_BIN" -m mmoe "$@"; }
# up_to_date PRODUCT SOURCE…   the product is there and none of its sources is newer.
up_to_date() {
    local product=$1 source
    [[ -e $product ]] || return 1
    for source in "${@:2}"; do [[ $source -nt $product ]] && return 1; done
    return 0
}
# part TITLE COMMAND…   runs one part of the story and says how long it took.
part() {
    local title=$1 begin=$SECONDS
    shift
    echo "── $title"
    "$@"
    echo "   $((SECONDS - begin)) s"
}
skip() { echo "── $1: up to date"; }
# prepare DATA SCENES_OPTIONS…   makes the data sets.
prepare() {
    part "data: stamps" mmoe data prepare stamps "$1"
    part "data: scenes" mmoe data prepare scenes "$@"
}
# finished STAGE   the run directory of a recipe without stages holds its last step's checkpoint.
finished() {
    [[ -e $1/recipe.toml && -e $1/checkpoints/$(printf "step_%08d" "$(sed -n 's/^steps = //p' "$1/recipe.toml")") ]]
}
# newest STAGE   prints its newest checkpoint.
newest() { echo "$1/checkpoints/$(< "$1/checkpoints/latest")"; }
# evaluate RUNNER TITLE OUT CHECKPOINT SUITE DATA OPTIONS…   RUNNER: part, or what runs it later.
evaluate() {
    local runner=$1 title="evaluate: $2" out=$3 checkpoint=$4 data=$6
    local sources=("$data/index.npz")
    [[ $5 == cv_bench ]] && sources=("$data"/test_*.parquet)
    [[ $checkpoint == - ]] || sources+=("$checkpoint/manifest.json")
    if up_to_date "$out" "${sources[@]}"; then
        skip "$title"
    else
        "$runner" "$title" mmoe evaluate "$checkpoint" --suite "$5" --data "$data" --json "$out" "${@:7}"
    fi
}
# export_and_ask CHECKPOINT RUN DATA   exports to RUN/hf, and asks the export about a captioned picture of DATA.
export_and_ask() {
    local checkpoint=$1 run=$2 data=$3
    if up_to_date "$run/hf/config.json" "$checkpoint/manifest.json"; then
        skip "export"
    else
        part "export to $run/hf" mmoe convert to-hf "$checkpoint" "$run/hf"
    fi
    local question="what is this ?"
    if up_to_date "$run/answer.txt" "$run/hf/config.json"; then
        skip "answer of the export"
    else
        part "the export is asked about $run/heldout.png: $question" ask "$run" "$data" "$question"
    fi
}
ask() { # RUN DATA QUESTION
    "$PYTHON_BIN" - "$2" "$1/heldout.png" << 'PYTHON'
import sys
from pathlib import Path

from mmoe.data.source import Source

data = Source(Path(sys.argv[1]), "scenes/heldout")
sample = next(s for s in map(data.read, range(len(data))) if s.record["category"] == "caption")
Path(sys.argv[2]).write_bytes(sample.images[0])
print(f"truth: {sample.record['branches'][0]['answer'].strip()}")
PYTHON
    mmoe generate "$1/hf" --prompt "$3" --image "$1/heldout.png" > "$1/answer.txt"
    echo "answer: $(< "$1/answer.txt")"
}
# report RUN SOURCE…   writes RUN/report.html and .png, and ends the story.
report() {
    if up_to_date "$1/report.html" "${@:2}"; then skip "report"; else part "report" mmoe report "$1"; fi
    echo "── done in $SECONDS s: open $1/report.html; the model is in $1/hf"
}
