#!/bin/sh
# sh examples/conversion/run.sh MODEL TRAIN HELD NAME... : train, evaluate and report each variant, then one table of all in
# runs/table. A training that was interrupted goes on, one that is done is not done again.
# More options of train in OPTIONS, what they are called in TAG: OPTIONS="--seed 1" TAG=-s1 sh examples/conversion/run.sh ...
# The text that is read in windows of up to 16,384 tokens in TEXT (default: HELD).
set -eu
model=$1 train=$2 held=$3
shift 3
here=$(dirname "$0")
for name in "$@"; do
    recipe=$here/$name.yaml run=runs/$name${TAG:--s0}
    set -- --config "$recipe" --model "$model" --train_data "$train" --eval_data "$held" --output "$run"
    ! grep -q "distill_weight" "$recipe" || set -- "$@" --distill "$model"
    # OPTIONS are words on purpose.
    # shellcheck disable=SC2086
    hf-sparse-attention train "$@" ${OPTIONS:-}
    hf-sparse-attention evaluate --models "$model" "$run/model" --data "${TEXT:-$held}" --tasks perplexity passkey needle \
        --lengths 1024 2048 4096 8192 16384 --dtype bfloat16 --output_dir "$run/evaluation"
    # Of a dense model there is nothing to report: every key carries weight.
    grep -q "^map: none" "$recipe" ||
        hf-sparse-attention report --model "$run/model" --dense "$model" --data "$held" --output_dir "$run/report"
done
hf-sparse-attention table --runs runs --output_dir runs/table
