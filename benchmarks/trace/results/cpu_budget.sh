#!/usr/bin/env bash
# The commands behind the *-cpu results: real weights, real TRACE data, a small stated budget, one CPU thread per run.
# usage: DATA=.../LLM-CL-Benchmark_500 MODELS=folder-of-`codyra-llm model get` cpu_budget.sh smollm2|gemma3 [OUT]
set -euo pipefail
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
out=${2:-runs}

arm() { # arm RECIPE MODEL NAME OVERRIDE...
  local recipe=$1 model=$2 name=$3; shift 3
  codyra-llm run "$recipe" model.path="$MODELS/$model" data.root="$DATA" data.epochs=2 optim.batch_size=4 \
    data.max_prompt_tokens=160 data.max_answer_tokens=40 checkpoint=false output="$out/$name" \
    eval.max_new_tokens='{C-STANCE: 4, FOMC: 4, NumGLUE-cm: 12, NumGLUE-ds: 12, Py150: 40, MeetingBank: 40, ScienceQA: 24, 20Minuten: 40}' "$@"
}
published=(method=seqlora method.rank=8 method.alpha=32 method.dropout=0.1 'method.targets=[q_proj,v_proj]'
  method.carry_optimizer=true optim.lr=1e-4 optim.schedule=constant)

case $1 in
  smollm2)
    size=(data.max_train_examples=32 eval.max_examples=16)
    arm trace_smollm2 smollm2-135m smollm2-codyra-cpu "${size[@]}" optim.lr=1e-3 method=codyra
    arm trace_smollm2 smollm2-135m smollm2-seqlora-cpu "${size[@]}" optim.lr=1e-3 method=seqlora
    arm trace_smollm2 smollm2-135m smollm2-seqlora-published-cpu "${size[@]}" "${published[@]}" ;;
  gemma3)
    size=(data.max_train_examples=12 eval.max_examples=8)
    arm trace_gemma3_270m gemma3-270m gemma3-codyra-cpu "${size[@]}" optim.lr=1e-3 method=codyra
    arm trace_gemma3_270m gemma3-270m gemma3-seqlora-cpu "${size[@]}" optim.lr=1e-3 method=seqlora
    arm trace_gemma3_270m gemma3-270m gemma3-seqlora-published-cpu "${size[@]}" "${published[@]}" ;;
esac
