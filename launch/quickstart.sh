#!/usr/bin/env bash
# launch/quickstart.sh [--short]   the whole story on one machine: data, training, evaluation, export, an answer, a report.
#
# A second run finds everything there and ends in seconds; a run that was stopped goes on where it stopped. --short is
# the same story in 60 steps on little data. Data lies in MMOE_DATA (data-cache), the run in MMOE_RUN
# (runs/quickstart); PYTHON_BIN names the interpreter (.venv/bin/python).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=story.sh
source "$(dirname "${BASH_SOURCE[0]}")/story.sh"

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
settings+=("data.root=$data" "parallel.expert=$ranks")

prepare "$data" "${scenes[@]}"
# The resolved recipe is what the run directory holds.
recipe=$(mmoe recipes quickstart --set "${settings[@]}")
if finished "$run" && [[ $recipe == "$(< "$run/recipe.toml")" ]]; then
    skip "train"
else
    part "train on $ranks rank(s)" \
        launch/torchrun.sh "$ranks" train quickstart --out "$run" --resume --set "${settings[@]}"
fi

checkpoint=$(newest "$run")
for split in test heldout; do
    evaluate part "$split" "$run/evaluation/$split.json" "$checkpoint" scenes "$data/scenes/$split"
done
evaluate part test-blank "$run/evaluation/test-blank.json" "$checkpoint" scenes "$data/scenes/test" --blank
export_and_ask "$checkpoint" "$run" "$data/scenes/heldout"
report "$run" "$run/metrics.jsonl" "$run"/evaluation/*.json
