#!/bin/sh
# The whole path at small size, on a CPU: the target's own answers to real prompts, a
# drafter trained on them, the check that vLLM computes what training computed, and its
# acceptance in vLLM beside the untrained drafter's. Ends with exit code 0 only if the
# trained one is better.
#
#   sh examples/train/demo.sh FOLDER      (BIN: where the commands are, if not in PATH)
set -eu
out=${1:?name a folder for the data and the drafters}
bin=${BIN:+$BIN/}
here=$(dirname "$0")
# One process, so that no core is spent on waiting.
export VLLM_ENABLE_V1_MULTIPROCESSING=0
# Large pages for tensors: less time to train on a CPU (docs/training.md).
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"

say() { printf '\n== %s\n' "$1"; }

target=$("${bin}vllm-mtp" demo-target | tail -n 1)

say "1/4 the target's own answers to real prompts"
"${bin}vllm-mtp" generate --target "$target" --prompts sharegpt --limit 256 \
    --max-tokens 96 --max-num-seqs 128 --held-out 0.12 --out "$out/data"

say "2/4 train a drafter on them"
[ -e "$out/untrained/config.json" ] || "${bin}vllm-mtp" init --target "$target" \
    --layers shared:all --num-speculative-tokens 4 --out "$out/untrained" > /dev/null
"${bin}vllm-mtp" train "$here/demo.yaml" --target "$target" --data "$out/data" \
    --output-dir "$out/drafter"

say "3/4 does vLLM compute what training computed?"
"${bin}vllm-mtp" check "$out/drafter" --target "$target"

say "4/4 acceptance on held-out prompts, in plain torch and in vLLM"
"${bin}vllm-mtp" eval "$out/drafter" --target "$target" --data "$out/data" \
    --in-vllm --baseline "$out/untrained"
