#!/usr/bin/env bash
# Picks the launcher by what it finds, installs what is missing, runs a recipe or the tests.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) started=$PWD
[ -f "$here/pyproject.toml" ] || here=${SLURM_SUBMIT_DIR:-$here}  # sbatch runs a copy of this file

usage() {
  cat <<'TEXT'
usage: ./launch.sh [FLAG ...] [run] RECIPE [KEY=VALUE ...]    run a recipe (recipes/*.yaml; after run a shipped one's name too)
       ./launch.sh [--dry-run] test [PYTEST ARGUMENT ...]    run the tests
       ./launch.sh [--dry-run] COMMAND ...    any other codyra-llm command (plan, data, model, score, generate, export, report)

A recipe runs on all GPUs of this machine, or in one process where there is one GPU or none. On several machines the
first of these that is found says how:
  --hostfile FILE     DeepSpeed's launcher, started once, over the hosts of FILE (lines "HOST slots=GPUS")
  --nodes N --rank R --master HOST[:PORT]    torchrun, started on each machine; R is 0 on the first, which is HOST
  NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT    the same from the environment; flags win
  a SLURM allocation  torchrun, once per node by srun (docs/slurm.sbatch)
  /job/hostfile       as with --hostfile
Further:
  --dry-run           print the command that would run, and run and install nothing
  PROCESSES           processes per machine (default: one per GPU, one without)
  ACCELERATE_CONFIG   an accelerate config, e.g. recipes/accelerate/zero2.yaml, for DeepSpeed; not with a hostfile
  PYTHON              the Python to use (default python3; 3.11 or later)
Where codyra_llm is not installed in the active Python, a .venv is made here with the versions of constraints.txt.
The run folder must lie on a file system that all machines share. docs/many_gpus.md has examples.
TEXT
}

refuse() { echo "error: $1" >&2; exit 2; }

go() {  # become the command, or print it so that it can be pasted
  if [ -n "$dry" ]; then
    [ "$PWD" = "$started" ] || printf 'cd %q && ' "$PWD"
    printf '%q ' "$@" | sed 's/ $//'; echo
    [ "$python" = "$base" ] || echo "without --dry-run, $here/.venv is made first where it is missing or old" >&2
    exit 0
  fi
  [ "$python" = "$base" ] || install
  exec "$@"
}

number() {  # NAME VALUE LEAST
  [[ $2 =~ ^(0|[1-9][0-9]*)$ ]] && [ "$2" -ge "$3" ] || refuse "$1: '$2' is not a whole number from $3 on; give one"
}

cores() { nproc 2>/dev/null || getconf _NPROCESSORS_ONLN; }

importable() { (cd / && "$1" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("codyra_llm") is None)') 2>/dev/null; }

install() {
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    refuse "$("$base" --version 2>&1) is too old; set PYTHON to a Python 3.11 or later"
  local want venv=$here/.venv
  want=$(cat "$here/pyproject.toml" "$here/constraints.txt" | cksum)
  mkdir -p "$venv"
  if command -v flock >/dev/null; then exec 9>"$venv/lock"; flock 9; fi  # two nodes, one folder
  if [ "$(cat "$venv/installed" 2>/dev/null)" != "$want" ]; then
    echo "installing into $venv (once; some minutes)" >&2
    "$base" -m venv "$venv"
    # DeepSpeed's operators are compiled where they are first used, if at all: nothing here needs them.
    DS_BUILD_OPS=0 "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      --constraint "$here/constraints.txt" --editable "$here[deepspeed,test]"
    echo "$want" > "$venv/installed"
  fi
  exec 9>&-
}

dry='' nodes=${NNODES:-} rank=${NODE_RANK:-} master=${MASTER_ADDR:-} port=${MASTER_PORT:-} hostfile='' asked=''
while [[ ${1:-} == -* ]]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry=yes; shift; continue ;;
    --nodes | --rank | --master | --hostfile) [ -n "${2:-}" ] || refuse "$1 needs a value; see ./launch.sh --help" ;;
    *) refuse "unknown flag '$1'; flags of launch.sh stand before the recipe, settings (key=value) after it, see --help" ;;
  esac
  case $1 in
    --nodes) nodes=$2 ;;
    --rank) rank=$2 ;;
    --master) master=${2%:*}; [ "$master" = "$2" ] || port=${2##*:} ;;
    --hostfile) hostfile=$2 ;;
  esac
  asked+="$1 "; shift 2
done
if [ $# -eq 0 ]; then [ -z "$dry$asked" ] || refuse "there is no recipe; see ./launch.sh --help"; usage; exit 0; fi

base=${PYTHON:-python3}
[[ $base != */* || $base == /* ]] || base=$PWD/$base  # it is called from other folders too
command -v "$base" >/dev/null || refuse "PYTHON: there is no program '$base'; set it to a Python 3.11 or later"
python=$base
importable "$base" || python=$here/.venv/bin/python
recipe=''  # run RECIPE is as RECIPE: in one process it would leave all GPUs but one idle
if [ "$1" = run ] && [[ ${2:--} != -* ]]; then recipe=yes; shift; fi
if [ -z "$recipe" ] && [[ $1 != *.yaml && $1 != *.yml ]]; then
  [ -z "$asked" ] || refuse "${asked% } is about running a recipe (a .yaml file), and '$1' is none; leave it out"
  [ "$1" = test ] || go "$python" -m codyra_llm "$@"
  shift; cd "$here"
  # One more than there are cores: a test that waits for processes that it started or killed leaves a core free.
  go env HF_HUB_OFFLINE=1 "$python" -m pytest --numprocesses $(($(cores) + 1)) --maxprocesses 8 --dist worksteal "$@"
fi

# Where the number of nodes comes from: flags or environment, SLURM, a hostfile.
slurm=''
if [ -n "$hostfile" ]; then
  [ -z "$nodes" ] || refuse "--hostfile and a number of nodes (--nodes or NNODES, here $nodes) exclude each other; give one"
  [ "$asked" = "--hostfile " ] || refuse "--hostfile names the hosts, so --rank and --master have no meaning; leave them out"
  [ -r "$hostfile" ] || refuse "--hostfile: there is no file '$hostfile'; write a line 'HOST slots=GPUS' for each machine"
elif [ -n "$nodes" ]; then number "--nodes (NNODES)" "$nodes" 1
elif [ -n "$asked" ]; then refuse "${asked% } without --nodes has no meaning; give the number of machines, --nodes N"
elif [ "${SLURM_NNODES:-1}" -gt 1 ] || { [ -n "${SLURM_NNODES:-}" ] && [ -z "${SLURMD_NODENAME:-}" ]; }; then
  slurm=yes nodes=$SLURM_NNODES rank=${SLURM_NODEID:-0}  # one node: from salloc's shell, which is on none
elif [ -r /job/hostfile ]; then hostfile=/job/hostfile
fi
nodes=${nodes:-1}

if [ -n "$slurm" ]; then
  steps=${SLURM_STEP_NUM_NODES:-0} tasks=${SLURM_STEP_NUM_TASKS:-$nodes}
  if [ "$steps" -ne "$nodes" ]; then  # in the batch script or salloc: this file once per node, with the CPUs that sbatch was told
    go srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 \
      ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "$here/launch.sh" ${recipe:+run} "$@"
  fi
  [ "$tasks" -eq "$nodes" ] || refuse "this SLURM step has $tasks tasks on $nodes nodes, and each would start all processes of its node; call launch.sh without srun, or with --ntasks-per-node=1"
fi

# One launcher.
# Lines of GPUs alone: without a driver nvidia-smi complains on standard output, and a GPU that is cut up (MIG) has a line
# for each part, of which CUDA gives a process one.
gpus=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU ' || true)
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ] && [ "$gpus" -gt 0 ]; then
  gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true)
fi
processes=${PROCESSES:-$((gpus > 1 ? gpus : 1))}
number PROCESSES "$processes" 1
if [ -n "$hostfile" ]; then
  [ -z "${ACCELERATE_CONFIG:-}" ] || refuse "ACCELERATE_CONFIG and a hostfile ($hostfile) exclude each other; for ZeRO put --deepspeed_config FILE.json after the recipe"
  options=(--hostfile "$hostfile" ${PROCESSES:+--num_gpus "$PROCESSES"} ${port:+--master_port "$port"})
  # DeepSpeed starts a single host's processes here whatever its name, yet would ask ssh for its address.
  if [ "$(grep -c '^[^#]*slots=' "$hostfile")" -eq 1 ]; then options+=(--no_ssh_check --master_addr 127.0.0.1); fi
  go "$python" -m deepspeed.launcher.runner "${options[@]}" --module --no_local_rank codyra_llm run "$@"
fi
[ -z "${ACCELERATE_CONFIG:-}" ] || [ -r "$ACCELERATE_CONFIG" ] ||
  refuse "ACCELERATE_CONFIG: there is no file '$ACCELERATE_CONFIG'; give the path of one, e.g. recipes/accelerate/zero2.yaml"
total=$((nodes * processes))
if [ "$total" -eq 1 ] && [ -z "${ACCELERATE_CONFIG:-}" ]; then go "$python" -m codyra_llm run "$@"; fi

if [ "$nodes" -gt 1 ]; then
  if [ -n "$slurm" ] && [ -z "$master" ]; then master=$(scontrol show hostnames "$SLURM_JOB_NODELIST"); fi
  master=${master%%$'\n'*}  # no `| head`: scontrol may find that nobody reads on, which pipefail calls a failure
  [ -n "$master" ] || refuse "$nodes machines need the address of the first; give --master HOST[:PORT] or MASTER_ADDR"
  number "--rank (NODE_RANK; 0 on the first of $nodes machines)" "$rank" 0
  [ "$rank" -lt "$nodes" ] || refuse "--rank (NODE_RANK): $rank is not below the number of machines, $nodes; the first is 0"
  port=${port:-$((29500 + ${SLURM_JOB_ID:-0} % 1000))}  # two jobs may share a node
  number --master "$port" 1
fi
threads=$(($(cores) / processes))
# torchrun passes on the signals it is given, SLURM's warning among them, then gives the processes time to save.
start=(env OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
  PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
  TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}" "$python" -m)
if [ -n "${ACCELERATE_CONFIG:-}" ]; then
  options=(--config_file "$ACCELERATE_CONFIG" --num_processes "$total" --num_machines "$nodes" --machine_rank "${rank:-0}")
  if [ "$nodes" -gt 1 ]; then  # standard: this script starts every node itself, DeepSpeed needs no ssh
    options+=(--main_process_ip "$master" --main_process_port "$port" --deepspeed_multinode_launcher standard)
  else options+=(--main_process_port "${port:-0}")  # 0: a free one
  fi
  go "${start[@]}" accelerate.commands.launch "${options[@]}" -m codyra_llm run "$@"
fi
options=(--nproc-per-node "$processes")
if [ "$nodes" -gt 1 ]; then
  options+=(--nnodes "$nodes" --node-rank "$rank" --master-addr "$master" --master-port "$port")
else options+=(--standalone)
fi
go "${start[@]}" torch.distributed.run "${options[@]}" -m codyra_llm run "$@"
