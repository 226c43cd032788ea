#!/usr/bin/env bash
# From nothing to a trained, stopped and resumed MoE++ model, on any machine with two cores:
#
#   bash launch/quickstart.sh            the whole tour
#   bash launch/quickstart.sh --short    the same with fewer steps
#
# 1. environment   2. raw sample corpora and a tokenizer   3. token shards, verified   4. two ranks train
# 5. they are stopped by a signal, and resumed   6. what was learned, and where the curves are
# Samples and shards are kept for the next time; the run's own folder is started anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
    "")
        stop_after=40 settings=()
        checks=(--below bigram --fall 0.3)
        ;;
    --short)
        stop_after=12 settings=(--set train.max_steps=30 --set train.warmup_steps=5)
        checks=(--fall 0.15)
        ;;
    *)
        echo "usage: bash launch/quickstart.sh [--short]" >&2
        exit 2
        ;;
esac
home=runs/quickstart
raw=$home/raw shards=$home/shards run=$home/run recipe=launch/recipes/quickstart.yaml
log=$home/quickstart.log

say() { printf '\n== %s\n' "$*"; }
fail() {
    echo "quickstart: FAILED: $*" >&2
    exit 1
}

# Whatever ends this script also ends the training it started.
train=
stop_training() {
    if [ -n "$train" ] && kill "$train" 2> /dev/null; then wait "$train" || true; fi
}
trap stop_training EXIT

say "1. environment"
. launch/setup_env.sh run
mkdir -p "$home"
gpus=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU' || true)
if [ "$gpus" -lt 2 ]; then
    export DS_ACCELERATOR=cpu
    echo "two ranks on the CPU (GPUs here: $gpus; two are needed to use them)"
fi

say "2. raw corpora in the formats of RedPajama, Dolma and the Pile: $raw"
if [ -f "$raw/sample.json" ]; then
    echo "kept: $raw"
else
    moepp-data sample "$raw"
fi

say "3. token shards: $shards"
if [ -f "$shards/manifest.json" ] && moepp-data verify "$shards" > "$log" 2>&1; then
    echo "kept, verified: $shards"
else
    moepp-data build "$shards" --tokenizer "$raw/tokenizer/tokenizer.model" \
        --redpajama "$raw/redpajama" --dolma "$raw/dolma" --pile "$raw/pile" \
        --held-out 0.05 # the sample is small: enough text of every source to score
    moepp-data verify "$shards"
fi
moepp-data describe "$shards"

start_training() {
    bash launch/train.sh --num_gpus 2 --log_level warning "$recipe" --run-dir "$run" ${settings[@]+"${settings[@]}"} "$@" &
    train=$!
}
# The exit code of the training in the background, in $code.
end_training() {
    code=0
    wait "$train" || code=$?
    train=
}
steps_done() { cat "$run/metrics.jsonl" 2> /dev/null | wc -l; }

say "4. two ranks train: $run"
rm -rf "$run"
start_training --resume none
while kill -0 "$train" 2> /dev/null && [ "$(steps_done)" -lt "$stop_after" ]; do sleep 0.2; done

say "5. SIGTERM after $(steps_done) steps: save, stop, resume"
kill -TERM "$train" 2> /dev/null || true
end_training
if [ "$code" -eq 0 ]; then
    echo "this machine was too fast: the run was complete before the signal came, and there is nothing to resume"
else
    [ "$code" -eq 75 ] || fail "a stopped run ends with exit code 75, this one ended with $code"
    start_training --resume auto
    end_training
    [ "$code" -eq 0 ] || fail "the resumed run ended with exit code $code"
fi

say "6. what was learned"
moepp report "$run" "${checks[@]}" || fail "the run did not learn what it should"
echo "numbers of every step:  $run/metrics.jsonl"
echo "curves:                 $(command -v tensorboard) --logdir $run/tensorboard"
