#!/usr/bin/env bash
# Train on several hosts, which see the same project folder, environment, shards and run folder.
#
# Best, wherever a scheduler, or a loop over ssh, can run a command on every host: a supervisor on each. Signals, exit
# codes, restarts and cleaning up are those of launch/train.sh, and hosts may be lost and replaced:
#
#   bash launch/train.sh --hostfile HOSTFILE --no_ssh --node_rank auto --max_restarts 5 RECIPE.yaml --resume auto
#
#   HOSTFILE             see launch/hostfile.example; read anew at every start
#   --node_rank auto|N   which line of it this host is: by its name or address, or by number from 0
#   --node_wait SECONDS  how long each start waits for all hosts of the file (600)
#   --min_nodes M        go on with M or more of them when others are still missing after that: with as many as the
#                        batch divides among. A host that comes too late says so and ends
#   --host_silence SECONDS  a host without a sign of life for so long is gone, and the attempt over (60)
#   --master_addr, --master_port  instead of the first host's name in the file and a free port there
#
# The supervisors find one another through RUN/.hosts in the run folder: no port, no daemon, no clock of theirs is
# compared. A signal to the supervisor of one host (its process id is in RUN/.hosts/NAME.lock) saves and stops all. When
# something ends on one host the others end within --exit_grace, and all start again together.
#
# This script is for where ssh without a password and pdsh are what there is: `deepspeed` reaches the other hosts, and
# nobody looks after them.
#
#   bash launch/train_multinode.sh HOSTFILE [launcher options] RECIPE.yaml [program arguments]
#   bash launch/train_multinode.sh hosts.txt --master_addr 10.0.0.1 launch/recipes/moepp_7b.yaml --resume auto
#
# Variables the ranks need go into a file .deepspeed_env (NAME=value lines) in the home or working folder. Ranks agree at
# every step whether one of them was told to stop, so to save and stop all of them tell one, on any host (the command
# of a rank, unlike those above it, has --local_rank behind the module's name):
#
#   pkill -TERM -f 'moepp_ds.train --local_rank=0 .*moepp_7b.yaml'
#
# Settings of the network, to be exported on every host (or written into .deepspeed_env)
#   NCCL_SOCKET_IFNAME=eth0     which interface NCCL meets on; needed where a host has several (docker0, ib0, ...)
#   NCCL_IB_HCA=mlx5            which InfiniBand adapters carry the data; NCCL_IB_DISABLE=1 for plain TCP
#   NCCL_DEBUG=WARN             INFO shows what NCCL chose: look there first when a start is slow or hangs
#   GLOO_SOCKET_IFNAME=eth0     the same for ranks on CPUs; without it gloo takes the address that the host's own name
#                               stands for, which must not be 127.0.1.1
# Timeouts, from the quickest to the last resort
#   --exit_grace                a rank ended: its host's others have so long, and all other hosts' as well
#   --host_silence              a host is gone without a word
#   safety.collective_timeout   (recipe) a link is cut, a rank hangs: the others wait so long for it in a collective.
#                               A save or a long evaluation of one rank must fit
set -euo pipefail
if [ $# -lt 2 ] || [ ! -f "$1" ]; then
    echo "usage: bash launch/train_multinode.sh HOSTFILE [launcher options] RECIPE.yaml [program arguments]" >&2
    [ $# -lt 1 ] || [ -f "$1" ] || echo "error: there is no hostfile $1; it has a line 'name slots=8' per host" >&2
    exit 2
fi
command -v pdsh > /dev/null || {
    echo "error: pdsh is not installed here; install it, or start launch/train.sh --no_ssh on every host" >&2
    exit 2
}
. "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" none
hostfile=$1
shift
options=()
while [ $# -gt 0 ] && [[ $1 != *.yaml && $1 != *.yml ]]; do
    options+=("$1")
    shift
done
exec deepspeed --hostfile "$hostfile" ${options[@]+"${options[@]}"} --module moepp_ds.train "$@"
