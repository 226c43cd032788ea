#!/usr/bin/env bash
# Train on several nodes, which see the same project folder, environment, shards and run folder.
#
#   bash launch/train_multinode.sh HOSTFILE [launcher options] RECIPE.yaml [program arguments]
#   bash launch/train_multinode.sh hosts.txt --master_addr 10.0.0.1 launch/recipes/moepp_7b.yaml --resume auto
#
# HOSTFILE has a line per node, `name slots=8`. This starts `deepspeed` here, which reaches the others by pdsh and
# ssh without a password; variables the ranks need go into a file .deepspeed_env (NAME=value lines) in the home or
# working folder. Ranks agree at every step whether one of them was told to stop, so to save and stop all of them
# tell one, on any node (the command of a rank, unlike those above it, has --local_rank behind the module's name):
#
#   pkill -TERM -f 'moepp_ds.train --local_rank=0 .*moepp_7b.yaml'
#
# Where a scheduler can run a command on every node (srun, mpirun, or a loop over ssh), this is better: no pdsh, and
# every node has its own supervisor, so signals, exit codes and cleaning up are those of launch/train.sh:
#
#   bash launch/train.sh --hostfile HOSTFILE --no_ssh --node_rank N --master_addr ADDRESS --master_port 29500 RECIPE.yaml
set -euo pipefail
if [ $# -lt 2 ] || [ ! -f "$1" ]; then
    echo "usage: bash launch/train_multinode.sh HOSTFILE [launcher options] RECIPE.yaml [program arguments]" >&2
    [ $# -lt 1 ] || [ -f "$1" ] || echo "error: there is no hostfile $1; it has a line 'name slots=8' per node" >&2
    exit 2
fi
command -v pdsh > /dev/null || {
    echo "error: pdsh is not installed here; install it, or start launch/train.sh --no_ssh on every node" >&2
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
