#!/bin/sh
# Trains one of the models in this folder from the text beside the repository, and puts it here.
#
#     sh benchmarks/models/train.sh tinystories-moe RUNS          (RUNS: a folder for checkpoints, 0.4 GB a model)
#
# Killed, the same command goes on. training.json states the command, the machine and the seconds that it took.
set -eu
name=$1
runs=$2
here=$(cd "$(dirname "$0")" && pwd)
data=${DATA:-$here/../../../shared/data}
case $name in
tinystories-moe) own="--activation drelu --l1 0.002 --seed 1" ;;
tinystories-moe-seed2) own="--activation drelu --l1 0.002 --seed 2" ;;
tinystories-moe-swiglu) own="--activation swiglu --seed 1" ;;
*) echo "train.sh: no recipe for $name" >&2 && exit 2 ;;
esac
set -- --text "$data/text/tinystories_train_2MB.txt@4" --text "$data/train/tinystories_v2_00.txt.gz@4" \
    --text "$data/train/storybooks_ccby_00.txt.gz@2"
for part in 00 01 02 03 04 05; do
    set -- "$@" --text "$data/train/classics_pd_$part.txt.gz@0.25"
done
# shellcheck disable=SC2086  # options are words
hybrid-train "$@" --vocab-size 4096 --experts 4 --seq-len 512 --context 512 --tokens 6M --threads 1 --save-every 25 \
    --round-to q8 \
    $own -o "$runs/$name"
mkdir -p "$here/$name"
cp "$runs/$name/model"/* "$here/$name/"
if [ "$name" = tinystories-moe ]; then
    store=$here/../../hybrid_runtime/shipped_models/$name
    rm -rf "$store.new"
    hybrid-convert "$here/$name" -o "$store.new" --quant q8
    rm -f "$store.new/.lock"
    cp "$here/$name/training.json" "$store.new/"
    rm -rf "$store"
    mv "$store.new" "$store"
fi
