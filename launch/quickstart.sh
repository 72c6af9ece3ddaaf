#!/usr/bin/env bash
# launch/quickstart.sh [--short]   the whole story on one machine: data, training, evaluation, export, an answer, a report.
#
# A second run finds everything there and ends in seconds; a run that was stopped goes on where it stopped. --short is
# the same story in 60 steps on little data. Data lies in MMOE_DATA (data-cache), the run in MMOE_RUN
# (runs/quickstart); PYTHON_BIN names the interpreter (.venv/bin/python).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export PYTHON_BIN=${PYTHON_BIN:-.venv/bin/python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
case "${1:-}" in
    "")
        data=${MMOE_DATA:-data-cache} run=${MMOE_RUN:-runs/quickstart}
        scenes=() settings=()
        ;;
    --short)
        data=${MMOE_DATA:-data-cache}/short run=${MMOE_RUN:-runs/quickstart-short}
        scenes=(--train 2000 --test 120)
        settings=(train.steps=60 optimizer.warmup_steps=10 checkpoint.every=30)
        ;;
    *)
        echo "usage: launch/quickstart.sh [--short]" >&2
        exit 2
        ;;
esac
ranks=$(($(nproc) > 1 ? 2 : 1))
settings+=("data.root=$data" "parallel.expert=$ranks")

if ! command -v "$PYTHON_BIN" > /dev/null; then
    echo "quickstart.sh: no Python at $PYTHON_BIN: run \`make build\`, or name one with PYTHON_BIN" >&2
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

part "data: stamps" mmoe data prepare stamps "$data"
part "data: scenes" mmoe data prepare scenes "$data" "${scenes[@]}"
# The resolved recipe is what the run directory holds; it names the last step.
recipe=$(mmoe recipes quickstart --set "${settings[@]}")
last=$(printf "step_%08d" "$(sed -n 's/^steps = //p' <<< "$recipe")")
if [[ -e $run/recipe.toml && -e $run/checkpoints/$last && $recipe == "$(< "$run/recipe.toml")" ]]; then
    skip "train"
else
    part "train on $ranks rank(s)" \
        launch/torchrun.sh "$ranks" train quickstart --out "$run" --resume --set "${settings[@]}"
fi

checkpoint=$run/checkpoints/$(< "$run/checkpoints/latest")
evaluate() { # NAME SPLIT OPTIONS…
    local out=$run/evaluation/$1.json title="evaluate: $1"
    if up_to_date "$out" "$checkpoint/manifest.json" "$data/scenes/$2/index.npz"; then
        skip "$title"
    else
        part "$title" mmoe evaluate "$checkpoint" --suite scenes --data "$data/scenes/$2" --json "$out" "${@:3}"
    fi
}
evaluate test test
evaluate heldout heldout
evaluate test-blank test --blank

if up_to_date "$run/hf/config.json" "$checkpoint/manifest.json"; then
    skip "export"
else
    part "export to $run/hf" mmoe convert to-hf "$checkpoint" "$run/hf"
fi

picture=$run/heldout.png answer=$run/answer.txt question="what is this ?"
ask() {
    "$PYTHON_BIN" - "$data/scenes/heldout" "$picture" << 'PYTHON'
import sys
from pathlib import Path

from mmoe.data.source import Source

data = Source(Path(sys.argv[1]), "scenes/heldout")
sample = next(s for s in map(data.read, range(len(data))) if s.record["category"] == "caption")
Path(sys.argv[2]).write_bytes(sample.images[0])
print(f"truth: {sample.record['branches'][0]['answer'].strip()}")
PYTHON
    mmoe generate "$run/hf" --prompt "$question" --image "$picture" > "$answer"
    echo "answer: $(< "$answer")"
}
if up_to_date "$answer" "$run/hf/config.json"; then
    skip "answer of the export"
else
    part "the export is asked about $picture: $question" ask
fi

report=$run/report.html
if up_to_date "$report" "$run/metrics.jsonl" "$run"/evaluation/*.json; then
    skip "report"
else
    part "report" mmoe report "$run"
fi
echo "── done in $SECONDS s: open $report; the model is in $run/hf"
