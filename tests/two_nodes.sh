#!/usr/bin/env bash
# Two machines on one: `tests/two_nodes.sh RECIPE [KEY=VALUE ...]` calls launch.sh on node1 and on node2, which share the
# disk, have a host name and a network each, and reach each other over one cable. What launch.sh reads from the environment
# (PROCESSES, ACCELERATE_CONFIG, PYTHON) holds on both; SECOND has further settings for node2. Ends with 0 if both did.
# Needs iproute2, and root or user namespaces. Nothing to clean up: a namespace ends with the processes in it, and
# --kill-child ends those with this one, so that any number of these can run at once.
set -euo pipefail
if [ "${1:-}" != --inside ]; then
  [ "$(id -u)" -eq 0 ] || user='--user --map-root-user'
  exec unshare ${user:-} --net --uts --pid --fork --kill-child --mount-proc "$0" --inside "$@"
fi
shift
launch=$(cd "$(dirname "$0")/.." && pwd)/launch.sh

hostname node1
unshare --net --uts sleep infinity & second=$!
on_second() { nsenter --target "$second" --net --uts "$@"; }
until [ "$(readlink /proc/$second/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
on_second hostname node2
ip link add eth0 type veth peer name eth0 netns "$second"
ip address add 10.0.0.1/24 dev eth0
on_second ip address add 10.0.0.2/24 dev eth0
for device in lo eth0; do ip link set "$device" up; on_second ip link set "$device" up; done

export GLOO_SOCKET_IFNAME=eth0  # gloo would look for the address of the host's name, which no name server knows
read -ra differing <<<"${SECOND:-}"
on_second "$launch" --nodes 2 --rank 1 --master 10.0.0.1 "$@" ${differing[@]+"${differing[@]}"} & other=$!
code=0
"$launch" --nodes 2 --rank 0 --master 10.0.0.1 "$@" || code=$?
wait "$other" || code=$?
exit "$code"
