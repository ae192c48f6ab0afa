#!/bin/sh
# sh examples/conversion/run.sh MODEL TRAIN HELD NAME... : trains, evaluates and reports each variant in runs/NAME-s0, then
# makes one table of all runs in runs/table. What was interrupted goes on with the same command, what is done is kept.
# From the environment:
#   SEEDS="0 1 2"     every variant with each seed, in NAME-s1 and so on
#   RATES="3e-4 1e-3" with each learning rate too, in NAME-lr3e-4-s0; not of files whose stages have rates of their own
#   CARDS="0 1 2 3"   spreads the runs over several GPUs, one at a time on each
#   TEXT              what perplexity by length is measured on (HELD)
#   LENGTHS, LIMIT    of the evaluation (1024 2048 4096 8192 16384; 20 windows, and needles of each depth)
#   OUT               folder of the runs (runs)      OPTIONS  further options of train
set -eu
model=$1 train=$2 held=$3
shift 3
here=$(dirname "$0") out=${OUT:-runs}
for name in "$@"; do
    if [ ! -f "$here/$name.yaml" ]; then
        echo "there is no $here/$name.yaml" >&2
        exit 2
    elif [ -n "${RATES:-}" ] && grep -q "^- {.*learning_rate" "$here/$name.yaml"; then
        echo "RATES is '$RATES', but the stages of $name.yaml have rates of their own: change them there" >&2
        exit 2
    fi
done

row() { # NAME SEED [RATE]
    recipe=$here/$1.yaml run=$out/$1${3:+-lr$3}-s$2
    set -- --config "$recipe" --model "$model" --train_data "$train" --eval_data "$held" --output "$run" --seed "$2" \
        ${3:+--learning_rate "$3"}
    ! grep -q "distill_weight" "$recipe" || set -- "$@" --distill "$model"
    # OPTIONS are words on purpose.
    # shellcheck disable=SC2086
    hf-sparse-attention train "$@" ${OPTIONS:-} || return 1
    # shellcheck disable=SC2086
    hf-sparse-attention evaluate --models "$model" "$run/model" --data "${TEXT:-$held}" --tasks perplexity passkey needle \
        --lengths ${LENGTHS:-1024 2048 4096 8192 16384} --limit "${LIMIT:-20}" --dtype bfloat16 \
        --output_dir "$run/evaluation" || return 1
    # Of a dense model there is nothing to report: every key carries weight.
    grep -q "^map: none" "$recipe" ||
        hf-sparse-attention report --model "$run/model" --dense "$model" --data "$held" --output_dir "$run/report"
}

# A background process a card, which takes every so-manieth run.
cards=${CARDS:-${CUDA_VISIBLE_DEVICES:-0}} count=0 processes=
for card in $cards; do count=$((count + 1)); done
first=0
for card in $cards; do
    (
        number=0 failed=0
        for name in "$@"; do
            for seed in ${SEEDS:-0}; do
                for rate in ${RATES:-""}; do
                    if [ $((number % count)) -eq "$first" ]; then
                        CUDA_VISIBLE_DEVICES=$card row "$name" "$seed" $rate || failed=1
                    fi
                    number=$((number + 1))
                done
            done
        done
        exit $failed
    ) &
    processes="$processes $!"
    first=$((first + 1))
done
failed=0
for process in $processes; do wait "$process" || failed=1; done
# A run that failed is no reason to have no table of the others, in which it is said to have failed.
hf-sparse-attention table --runs "$out" --output_dir "$out/table"
exit $failed
