#!/usr/bin/env bash
# launch/system.sh NAME [--short] [KEY=VALUE…]   the whole story of a recipe with stages (llava_tiny, yi_vl_tiny, …):
# data, all stages, each stage's answers and held-out loss at its beginning and its end, what the last one answers without
# pictures, export, an answer, a report.
#
# A second run finds everything there and ends in seconds; a run that was stopped goes on where it stopped. --short is
# the same story in a few steps on little data. KEY=VALUE is laid over the recipe, as by --set. Data lies in MMOE_DATA
# (data-cache), the run in MMOE_RUN (runs/NAME); PYTHON_BIN names the interpreter (.venv/bin/python).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=story.sh
source "$(dirname "${BASH_SOURCE[0]}")/story.sh"

usage() {
    echo "usage: launch/system.sh NAME [--short] [KEY=VALUE…]   (NAME: a recipe with stages, for example llava_tiny)" >&2
    exit 2
}
name=${1:-} short=
[[ $name && $name != -* ]] || usage
shift
if [[ ${1:-} == --short ]]; then
    short=-short
    shift
fi
for setting; do [[ $setting == *=* ]] || usage; done
data=${MMOE_DATA:-data-cache}${short:+/short} run=${MMOE_RUN:-runs/$name$short}
scenes=() settings=("data.root=$data")
plain=$(mmoe recipes "$name")
stages=$(grep -c '^\[\[stages\]\]$' <<< "$plain") || {
    echo "system.sh: the recipe $name has no stages: launch/quickstart.sh shows how such a one is trained" >&2
    exit 2
}
if [[ $short ]]; then
    scenes=(--train 2000 --test 120)
    settings+=(train.global_batch=4 train.micro_batch=2)
    for ((i = 0; i < stages; i++)); do
        settings+=("stages.$i.train.steps=10" "stages.$i.optimizer.warmup_steps=2")
    done
fi
settings+=("$@")

prepare "$data" "${scenes[@]}"
choices= # whether a stage's mixture reads questions in CV-Bench's format
sets=    # what the stages' mixtures read
declare -A prompts # by data set (scenes, stamps, …), the system prompt that the last stage trains it with
mixtures=$("$PYTHON_BIN" -c '
import sys
from shlex import quote
from mmoe.data.mixture import load_mixture
from mmoe.recipe import load_recipe
stages = load_recipe(sys.argv[1], sys.argv[2:]).stages
mixtures = [load_mixture(stage.data.mixture) for stage in stages]
print("sets=" + quote(" ".join(part.path for parts in mixtures for part in parts)))
for part in mixtures[-1]:
    print("prompts[" + quote(part.path.partition("/")[0]) + "]=" + quote(part.system_prompt))
' "$name" "${settings[@]}")
eval "$mixtures"
if [[ " $sets" == *" cv_bench/"* ]]; then
    choices=1
    part "data: cv_bench" mmoe data prepare cv_bench "$data" "${scenes[@]}"
fi
recipe=$(mmoe recipes "$name" --set "${settings[@]}")
trained() { # all stages, of this recipe
    [[ -e $run/recipe.toml && $recipe == "$(< "$run/recipe.toml")" ]] || return 1
    ((${#folders[@]} == stages)) || return 1
    local folder
    for folder in "${folders[@]}"; do finished "$folder" || return 1; done
}
folders=("$run"/[1-9]*-*/)
if trained; then
    skip "train"
else
    part "train on $ranks rank(s), $stages stages" \
        launch/torchrun.sh "$ranks" train "$name" --out "$run" --resume --set "${settings[@]}"
    folders=("$run"/[1-9]*-*/)
fi

queue=()
# behind DATASET   sets what puts a sample of it behind its system prompt.
behind() { behind=(${prompts[$1]:+--system-prompt "${prompts[$1]}"}); }
later() { queue+=(-- "$@"); } # TITLE COMMAND…
running=()
# What is queued, in as many processes as ranks. Without a terminal they have no progress bars, which would mix.
run_queue() {
    local i one threads=$(($(nproc) / ranks))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
    # Background processes ignore Ctrl-C: they end with the script, also where one of them fails.
    trap 'kill "${running[@]}" 2> /dev/null || true' EXIT
    for ((i = 0; i < ranks; i++)); do
        "$PYTHON_BIN" launch/several.py "$i" "$ranks" "${queue[@]}" 2> >(cat >&2) &
        running+=($!)
    done
    for one in "${running[@]}"; do wait "$one"; done
    trap - EXIT
}
before=- written=()
for folder in "${folders[@]%/}"; do
    stage=${folder##*/} out=$folder/evaluation checkpoint=$(newest "$folder")
    for split in scenes/heldout stamps/heldout; do
        file=loss-${split/\//-}.json
        behind "${split%/*}"
        evaluate later "$stage begins, loss on $split" "$out/begin/$file" "$before" loss "$data/$split" \
            --as "$folder/recipe.toml" "${behind[@]}"
        evaluate later "$stage, loss on $split" "$out/$file" "$checkpoint" loss "$data/$split" "${behind[@]}"
    done
    behind scenes
    for split in test heldout; do
        evaluate later "$stage, $split" "$out/$split.json" "$checkpoint" scenes "$data/scenes/$split" "${behind[@]}"
    done
    before=$checkpoint
done
evaluate later "$stage, test-blank" "$out/test-blank.json" "$checkpoint" scenes "$data/scenes/test" --blank \
    "${behind[@]}"
evaluate later "$stage, loss on scenes/heldout, blank" "$out/loss-scenes-heldout-blank.json" "$checkpoint" loss \
    "$data/scenes/heldout" --blank "${behind[@]}"
evaluate later "$stage, test, no images" "$out/test-no-images.json" "$checkpoint" scenes "$data/scenes/test" --no-images \
    "${behind[@]}"
if [[ $choices ]]; then
    behind cv_bench
    for split in test heldout; do
        evaluate later "$stage, CV-Bench's format, $split" "$out/cv-bench-$split.json" "$checkpoint" cv_bench \
            "$data/cv_bench/$split" --limit 1200 "${behind[@]}"
    done
    evaluate later "$stage, CV-Bench's format, no images" "$out/cv-bench-no-images.json" "$checkpoint" cv_bench \
        "$data/cv_bench/test" --limit 1200 --no-images "${behind[@]}"
fi
((${#queue[@]} == 0)) || run_queue

export_and_ask "$checkpoint" "$run" "$data/scenes/heldout"
for folder in "${folders[@]%/}"; do
    written+=("$folder/metrics.jsonl" "$folder"/evaluation/*.json "$folder"/evaluation/begin/*.json)
done
report "$run" "${written[@]}"
