#!/usr/bin/env bash
# The ranks under DeepSpeed's launcher, with any engine; a failure starts all of them again from the last checkpoint.
#
#   launchers/deepspeed.sh --config configs/mine.yaml parallel.engine=zero3          one machine
#   HOSTFILE=hosts launchers/deepspeed.sh --config …                                 several, by ssh, from the first one
#   HOSTFILE=hosts NODE_RANK=0 MASTER_ADDR=10.0.0.1 launchers/deepspeed.sh …         several, on each one, without ssh
#   LAUNCHER=deepspeed slurm/pretrain.sh …                                           under Slurm, without ssh
#
# HOSTFILE          lines like "node-1 slots=8"; a node's number is its line, from 0 (Slurm: made from the allocation)
# PROCESSES         ranks on this machine where there is no HOSTFILE (default: its GPUs, else 2)
# MAX_RESTARTS      how often a failure may start the ranks again (default 3)
# LOG_DIR           folder for one log file per rank (default under Slurm: logs in the run folder; else the terminal)
# FUSIONTREE_PYTHON the python to run (default: .venv/bin/python beside the project, else python3)
#
# Exit codes: 0 the run is at its end; 75 it was saved after a signal, start it again to go on; 2 something given is
# wrong; anything else it failed. By ssh a signal does not reach the other machines' ranks; the two ways without do.
set -uo pipefail
# shellcheck source=launchers/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
answer_alone "${BASH_SOURCE[0]}" "$@"
place_in_slurm
count_processes
ranks=$((${NNODES:-1} * PROCESSES))
if [ -n "${HOSTFILE:-}" ]; then ranks=$(awk -F'slots=' 'NF > 1 { n += $2 } END { print n }' "$HOSTFILE"); fi
find_run_dir "$ranks" "$@"
if ! "$python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("deepspeed"))'; then
    echo "error: $python has no package deepspeed; install fusiontree[deepspeed]" >&2
    exit 2
fi

if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${HOSTFILE:-}" ]; then
    HOSTFILE=$(mktemp)
    trap 'rm -f "$HOSTFILE"' EXIT
    # Ranks meet at MASTER_ADDR; of these names only the order and the number matter.
    for ((node = 0; node < NNODES; node++)); do echo "node-$node slots=$PROCESSES"; done >"$HOSTFILE"
    LOG_DIR=${LOG_DIR:-$run_dir/logs}
fi
if [ -z "${HOSTFILE:-}" ]; then
    where=(--hostfile /dev/null --num_accelerators "$PROCESSES" --master_port "${MASTER_PORT:-29500}")
elif [ -n "${NODE_RANK:-}" ]; then
    stop_without "NODE_RANK is $NODE_RANK; every node needs the first one's address" MASTER_ADDR
    where=(--hostfile "$HOSTFILE" --no_ssh --node_rank "$NODE_RANK")
    where+=(--master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
else
    where=(--hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"})
fi
[ -z "${LOG_DIR:-}" ] || where+=(--enable_each_rank_log "$LOG_DIR")

# DeepSpeed's two launcher processes die of SIGUSR1, and of SIGTERM before the ranks have saved: they are started with
# these ignored, and the ranks (children of the second launcher) are signalled themselves.
launch() {
    trap '' USR1 TERM INT HUP
    exec "$python" -m deepspeed.launcher.runner "$@"
}
pass_signal() {
    local launcher
    for launcher in $(pgrep -P "$2"); do pkill "-$1" -P "$launcher"; done
}
restarts=0
while :; do
    run_with_signals launch "${where[@]}" --module fusiontree.train "$@"
    if [ "$code" -ne 0 ] && saved_after_signal; then code=75; fi
    case $code in 0 | 2 | 75) break ;; esac
    if [ -n "$signalled" ] || [ "$restarts" -ge "${MAX_RESTARTS:-3}" ]; then break; fi
    restarts=$((restarts + 1))
    echo "the ranks failed with exit code $code; restart $restarts of ${MAX_RESTARTS:-3}" >&2
done
exit "$code"
