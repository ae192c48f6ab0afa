#!/bin/sh
# sh examples/conversion/run.sh MODEL TRAIN HELD NAME... : train, evaluate and report each variant. A training that was
# interrupted goes on, one that is done is not done again.
# More options of train in OPTIONS, what they are called in TAG: OPTIONS="--seed 1" TAG=-s1 sh examples/conversion/run.sh ...
set -eu
model=$1 train=$2 held=$3
shift 3
here=$(dirname "$0")
for name in "$@"; do
    run=runs/$name${TAG:--s0}
    distill=
    case $name in distill-*) distill="--distill $model" ;; esac
    # OPTIONS and distill are words on purpose.
    # shellcheck disable=SC2086
    hf-sparse-attention train --config "$here/$name.yaml" --model "$model" --train_data "$train" --eval_data "$held" \
        --output "$run" $distill ${OPTIONS:-}
    hf-sparse-attention evaluate --models "$model" "$run/model" --data "$held" --lengths 1024 2048 4096 8192 \
        --output_dir "$run/evaluation"
    # Of a dense model there is nothing to report: every key carries weight.
    case $name in
    control-softmax | softmax-yarn-grow | softmax-theta-grow) ;;
    *) hf-sparse-attention report --model "$run/model" --data "$held" --output_dir "$run/report" ;;
    esac
done
