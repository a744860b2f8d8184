#!/usr/bin/env bash
# Installs what is missing, picks the launcher, runs a recipe or the tests.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ -f "$here/pyproject.toml" ] || here=${SLURM_SUBMIT_DIR:-$here}  # sbatch runs a copy of this file

usage() {
  cat <<'TEXT'
usage: ./launch.sh RECIPE [KEY=VALUE ...]    run a recipe (recipes/*.yaml)
       ./launch.sh test [PYTEST ARGUMENT ...]    run the tests
       ./launch.sh COMMAND ...    any other codyra-llm command (plan, data, model, score, generate, export, report)

Where codyra_llm is not installed in the active Python, a .venv is made here with the versions of constraints.txt.
  PYTHON              the Python to use (default python3; 3.11 or later)
  PROCESSES           processes per node (default: one per GPU, one without)
  ACCELERATE_CONFIG   an accelerate config, e.g. recipes/accelerate/zero2.yaml, for DeepSpeed
  NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT    several nodes; under SLURM they are taken from the allocation
The run folder must lie on a file system that all nodes share.
TEXT
}

if [ $# -eq 0 ] || [ "$1" = -h ] || [ "$1" = --help ]; then usage; exit 0; fi

python=${PYTHON:-python3}
importable() { (cd / && "$1" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("codyra_llm") is None)') 2>/dev/null; }

install() {
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $("$python" --version 2>&1) is too old; set PYTHON to a Python 3.11 or later" >&2; exit 2; }
  local want venv=$here/.venv
  want=$(cat "$here/pyproject.toml" "$here/constraints.txt" | cksum)
  mkdir -p "$venv"
  if command -v flock >/dev/null; then exec 9>"$venv/lock"; flock 9; fi  # two nodes, one folder
  if [ "$(cat "$venv/installed" 2>/dev/null)" != "$want" ]; then
    echo "installing into $venv (once; some minutes)" >&2
    "$python" -m venv "$venv"
    # DeepSpeed's operators are compiled where they are first used, if at all: nothing here needs them.
    DS_BUILD_OPS=0 "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      --constraint "$here/constraints.txt" --editable "$here[deepspeed,test]"
    echo "$want" > "$venv/installed"
  fi
  exec 9>&-
  python=$here/.venv/bin/python
}

importable "$python" || install

case $1 in
  test) shift; cd "$here"; HF_HUB_OFFLINE=1 exec "$python" -m pytest "$@" ;;
  *.yaml | *.yml) ;;
  *) exec "$python" -m codyra_llm "$@" ;;
esac

nodes=${NNODES:-${SLURM_NNODES:-1}}
if [ "$nodes" -gt 1 ] && [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${SLURM_STEP_NODELIST:-}" ]; then
  exec srun --ntasks-per-node=1 "$here/launch.sh" "$@"  # in the batch script: once per node
fi
gpus=$( (nvidia-smi -L 2>/dev/null || true) | wc -l)
processes=${PROCESSES:-$((gpus > 1 ? gpus : 1))}
total=$((nodes * processes))
if [ "$total" -eq 1 ] && [ -z "${ACCELERATE_CONFIG:-}" ]; then exec "$python" -m codyra_llm run "$@"; fi

master=${MASTER_ADDR:-} rank=${NODE_RANK:-${SLURM_NODEID:-0}} port=${MASTER_PORT:-29500}
if [ "$nodes" -gt 1 ] && [ -z "$master" ]; then
  command -v scontrol >/dev/null || { echo "error: set MASTER_ADDR to the first node's address" >&2; exit 2; }
  master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi
cores=$(( $(getconf _NPROCESSORS_ONLN) / processes ))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 0 ? cores : 1))}
if [ -n "${ACCELERATE_CONFIG:-}" ]; then
  options=(--config_file "$ACCELERATE_CONFIG" --num_processes "$total" --num_machines "$nodes" --machine_rank "$rank")
  if [ "$nodes" -gt 1 ]; then  # standard: this script starts every node itself, DeepSpeed needs no ssh
    options+=(--main_process_ip "$master" --main_process_port "$port" --deepspeed_multinode_launcher standard)
  else options+=(--main_process_port "${MASTER_PORT:-0}")  # 0: a free one
  fi
  exec "$python" -m accelerate.commands.launch "${options[@]}" -m codyra_llm run "$@"
fi
options=(--nproc-per-node "$processes")
if [ "$nodes" -gt 1 ]; then
  options+=(--nnodes "$nodes" --node-rank "$rank" --master-addr "$master" --master-port "$port")
else options+=(--standalone)
fi
exec "$python" -m torch.distributed.run "${options[@]}" -m codyra_llm run "$@"
