#!/usr/bin/env bash
# One workstation, or several nodes that meet at an address, under torchrun; a failed rank restarts all of them from the
# last checkpoint.
#
#   launchers/torchrun.sh --config configs/mine.yaml training.max_steps=1000
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launchers/torchrun.sh --config configs/mine.yaml     (on each node)
#   LAUNCHER=torchrun slurm/pretrain.sh …                                                           (under Slurm)
#
# PROCESSES         ranks on this node (default: its GPUs, else 2)
# MAX_RESTARTS      how often a failure may restart the ranks (default 3)
# SHUTDOWN_TIMEOUT  seconds that ranks have to save after a signal before they are killed (default 600)
# JOIN_TIMEOUT      seconds that nodes wait for each other at a start or restart (default 1800)
# LOG_DIR           folder for the ranks' logs (default: logs in the run folder)
# FUSIONTREE_PYTHON the python to run (default: .venv/bin/python beside the project, else python3)
#
# Exit codes: 0 the run is at its end; 75 it was saved after a signal, start it again to go on; 2 something given is
# wrong; anything else it failed.
set -uo pipefail
# shellcheck source=launchers/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
answer_alone "${BASH_SOURCE[0]}" "$@"
place_in_slurm
count_processes
find_run_dir "$((${NNODES:-1} * PROCESSES))" "$@"

if [ "${NNODES:-1}" = 1 ]; then
    where=(--standalone)
else
    stop_without "NNODES is $NNODES; every node needs the first one's address and its own number, from 0" \
        MASTER_ADDR NODE_RANK
    MASTER_PORT=${MASTER_PORT:-29500}
    # The first node keeps the rendezvous. Nodes that lose each other for a while meet there again.
    first=$([ "$NODE_RANK" = 0 ] && echo true || echo false)
    where=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT"
        --rdzv-id "fusiontree-${SLURM_JOB_ID:-0}"
        --rdzv-conf "is_host=$first,join_timeout=${JOIN_TIMEOUT:-1800},read_timeout=${JOIN_TIMEOUT:-1800}")
    # Any node may become the ranks' meeting point, and the name of a host need not be an address that its peers know.
    address=$(address_towards "$MASTER_ADDR") || exit 2
    where+=(--local-addr "$address")
    unset MASTER_ADDR MASTER_PORT # torchrun tells its ranks where they meet
fi

# Without this, restarted ranks meet in the store of the attempt that failed and find its dead addresses (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# torchrun by itself dies of SIGUSR1 and leaves the ranks behind; handled, it passes the signal on and waits.
run_with_signals "$python" -m torch.distributed.run "${where[@]}" --nproc-per-node "$PROCESSES" \
    --max-restarts "${MAX_RESTARTS:-3}" --shutdown-timeout "${SHUTDOWN_TIMEOUT:-600}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --log-dir "${LOG_DIR:-$run_dir/logs}" --tee 3 -m fusiontree.train "$@"
if [ "$code" -ne 0 ] && saved_after_signal; then code=75; fi
exit "$code"
