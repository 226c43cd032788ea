#!/usr/bin/env bash
# Train on this host, and look after the run:
#
#   bash launch/train.sh [launcher options] RECIPE.yaml [--set key=value ...] [--run-dir DIR] [--resume auto|none|PATH]
#   bash launch/train.sh --num_gpus 2 launch/recipes/quickstart.yaml --resume auto
#
# Launcher options are those of the `deepspeed` command (--num_gpus N, --include, --master_port, ...), and
#   --max_restarts N       after a failure start again from the newest valid checkpoint, up to N times in a row
#                          without getting further (0); not after one that every start would meet, as a mistake in the
#                          recipe, with which a rank ends with code 78
#   --stop_grace SECONDS   how long ranks may take to save after a stop (600)
#   --exit_grace SECONDS   how long ranks may outlive the first one that ended (60)
# and, started on each of several hosts (more in launch/train_multinode.sh),
#   --hostfile FILE --no_ssh --node_rank auto|N [--min_nodes M] [--node_wait SECONDS] [--host_silence SECONDS]
#
# SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGHUP to this script save a checkpoint and stop every rank; a second Ctrl-C
# kills them. No process is left behind. Exit code, from the run's own status.json and not from the launcher's code:
#   0 completed    75 stopped, goes on with --resume auto    1 failed or not started    2 no such option
# Of a failed run the last line names the rank that ended first, and how.
#
# Without --num_gpus all devices of the host are used; on a machine without a GPU, N processes on the CPU.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" none
exec python3 -m moepp_ds.launcher "$@"
