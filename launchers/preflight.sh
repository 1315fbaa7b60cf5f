#!/usr/bin/env bash
# Measure the network between the nodes of a Slurm allocation, as training would use it: names slow and dead links and
# nodes in about two minutes. slurm/pretrain.sh runs it before training where PREFLIGHT=1.
#
#   launchers/preflight.sh [options of python -m fusiontree.preflight]
#
# PROCESSES, SRUN_ARGS and FUSIONTREE_PYTHON are as in launchers/srun.sh. Exit codes: 0 all links are fit; 1 some are not;
# 2 something given is wrong.
set -euo pipefail
unset LOG_DIR # its table belongs into the job's own log
LAUNCHER=srun MODULE=fusiontree.preflight exec "$(dirname "${BASH_SOURCE[0]}")/srun.sh" "$@"
