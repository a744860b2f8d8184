#!/usr/bin/env bash
# The commands behind the mini-* results: mini-TRACE, small LLaMA, three seeds, one CPU thread per run.
# usage: mini.sh [OUT]
set -euo pipefail
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
out=${1:-runs}

arm() { # arm NAME SEED OVERRIDE...
  local name=$1 seed=$2; shift 2
  codyra-llm run quickstart seed="$seed" checkpoint=false output="$out/mini-$name-$seed" "$@"
}

for seed in 1 2 3; do
  arm codyra "$seed"
  arm seqlora "$seed" method=seqlora method.rank=8
  arm seqlora-fresh "$seed" method=seqlora method.rank=8 method.fresh=true
done
for seed in 1 2 3; do
  arm codyra-published "$seed" method.align=false method.importance_init=normal method.threshold.schedule=published \
    method.threshold.operator=released
  arm codyra-random "$seed" method.align=false method.selection=random method.keep=0.82
done
