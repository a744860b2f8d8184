#!/usr/bin/env bash
# Two machines on one, node1 and node2: they share the disk, have a host name and a network each, and one cable between them.
#   tests/two_nodes.sh RECIPE [KEY=VALUE ...]        call launch.sh on both; ends with 0 if both did
#   tests/two_nodes.sh --slurm FOLDER COMMAND ...    a SLURM cluster of the two, its files in FOLDER; COMMAND on node1
# What launch.sh reads from the environment (PROCESSES, ACCELERATE_CONFIG, PYTHON) holds on both. Needs iproute2 and root or
# user namespaces; SLURM (Debian's slurm-wlm) needs root. Nothing is to be cleaned up: a namespace ends with its processes,
# --kill-child ends those with this one, and any number of these can run at once.
set -euo pipefail
if [ "${1:-}" != --inside ]; then
  [ "$(id -u)" -eq 0 ] || user='--user --map-root-user'
  exec unshare ${user:-} --net --uts --pid --fork --kill-child --mount-proc "$0" --inside "$@"
fi
shift
root=$(cd "$(dirname "$0")/.." && pwd)

hostname node1
unshare --net --uts sleep infinity & second=$!
on_second() { nsenter --target "$second" --net --uts "$@"; }
until [ "$(readlink /proc/$second/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
on_second hostname node2
ip link add eth0 type veth peer name eth0 netns "$second"
ip address add 10.0.0.1/24 dev eth0
on_second ip address add 10.0.0.2/24 dev eth0
for device in lo eth0; do ip link set "$device" up; on_second ip link set "$device" up; done
export GLOO_SOCKET_IFNAME=eth0  # gloo would look for the address of the host's name

if [ "$1" = --slurm ]; then
  folder=$2; shift 2
  printf '%s\n' '127.0.0.1 localhost' '10.0.0.1 node1' '10.0.0.2 node2' > "$folder/hosts"
  mount --bind "$folder/hosts" /etc/hosts  # in this mount namespace
  export SLURM_CONF=$folder/slurm.conf
  cat > "$SLURM_CONF" <<TEXT
ClusterName=two
SlurmctldHost=node1
NodeName=node[1-2] CPUs=64 RealMemory=1000
PartitionName=all Nodes=ALL Default=YES
AuthType=auth/none
CredType=cred/none
SlurmUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
TEXT
  mkdir "$folder/state" "$folder/node1" "$folder/node2"
  slurmctld -D -c 2> "$folder/slurmctld.log" &
  slurmd -D 2> "$folder/node1.log" &
  on_second slurmd -D 2> "$folder/node2.log" &
  for _ in $(seq 60); do [ "$(sinfo --noheader --format='%T %D' 2>/dev/null)" != 'idle 2' ] || break; sleep 0.5; done
  "$@"; exit
fi

on_second "$root/launch.sh" --nodes 2 --rank 1 --master 10.0.0.1 "$@" & other=$!
code=0
"$root/launch.sh" --nodes 2 --rank 0 --master 10.0.0.1 "$@" || code=$?
wait "$other" || code=$?
exit "$code"
