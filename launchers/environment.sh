# Sourced by every launcher and by slurm/*.sh: the project, its python, where this node stands among the nodes, and how
# signals reach the ranks. This is the one translation of Slurm's variables for launchers; what a single process makes
# of its own is in fusiontree/utils/environment.py. Whatever is set already stays.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# A given python is taken as it is: inside a container it may stand at a path that this machine does not have.
python=${FUSIONTREE_PYTHON:-$root/.venv/bin/python}
if [ -z "${FUSIONTREE_PYTHON:-}" ] && [ ! -x "$python" ]; then
    python=$(command -v python3) || python=python3
    # The system's python may lack the packages, whose first import would end in a traceback.
    "$python" -c 'import sys; from importlib.util import find_spec as f; sys.exit(not (f("torch") and f("yaml") and f("tqdm")))' || {
        echo "error: $python lacks the packages of this project, and $root/.venv does not exist; run 'make install' in" \
            "$root, activate an environment that has them, or set FUSIONTREE_PYTHON" >&2
        exit 2
    }
fi
# A clone is used as it is; it need not be installed in the environment.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1

# answer_alone SCRIPT ARGUMENTS… ends the script where one process answers the arguments: help, or what a run would be.
answer_alone() {
    local argument
    for argument in "${@:2}"; do
        case $argument in
        -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1" && echo ;;
        --print-config | --print-run-dir) ;;
        *) continue ;;
        esac
        exec "$python" -m "${MODULE:-fusiontree.train}" "${@:2}"
    done
}

# tasks_per_node TASKS NODES prints the tasks on each node, if there are more than one and as many on each.
tasks_per_node() {
    if [ "${1:-0}" -gt "$2" ] && [ $(($1 % $2)) = 0 ]; then echo $(($1 / $2)); fi
}

# Sets NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and, where it is known, PROCESSES (ranks on each node).
place_in_slurm() {
    stop_unless_number NNODES NODE_RANK MASTER_PORT PROCESSES SLURM_JOB_NUM_NODES SLURM_NODEID SLURM_JOB_ID
    # An IPv6 address may be written as in a URL.
    MASTER_ADDR=${MASTER_ADDR:-} MASTER_ADDR=${MASTER_ADDR#[} MASTER_ADDR=${MASTER_ADDR%]}
    [ -n "$MASTER_ADDR" ] || unset MASTER_ADDR
    [ -n "${SLURM_JOB_ID:-}" ] || return 0
    NNODES=${NNODES:-${SLURM_JOB_NUM_NODES:-1}}
    NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
    if [ -z "${MASTER_ADDR:-}" ]; then
        # Ranks meet on the first node. A node's name need not be an address; what Slurm reaches it by is.
        local first
        stop_without "Slurm does not say which nodes job $SLURM_JOB_ID has" SLURM_JOB_NODELIST
        first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
        MASTER_ADDR=$(scontrol show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
        stop_without "the address of the first node '$first' of job $SLURM_JOB_ID is not known" MASTER_ADDR
    fi
    # The port follows from the job, so that two jobs on one node do not meet each other; ports from 32768 on are those
    # that the system gives to outgoing connections.
    MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12000))}
    PROCESSES=${PROCESSES:-${SLURM_NTASKS_PER_NODE:-$(tasks_per_node "${SLURM_NTASKS:-}" "$NNODES")}}
    PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-}}
    export NNODES NODE_RANK MASTER_ADDR MASTER_PORT PROCESSES
}

# Sets PROCESSES to this machine's GPUs, or 2 where it has none.
count_processes() {
    [ -n "${PROCESSES:-}" ] || PROCESSES=$("$python" -c 'import torch; print(torch.cuda.device_count() or 2)')
    export PROCESSES
}

# stop_without MESSAGE NAME… ends the script with code 2 where one of the variables is not set or empty.
stop_without() {
    local name
    for name in "${@:2}"; do
        [ -z "${!name:-}" ] || continue
        echo "error: $1: set $name" >&2
        exit 2
    done
}

# stop_unless_number NAME… ends the script with code 2 where one of the variables is set and no number from 0.
stop_unless_number() {
    local name
    for name in "$@"; do
        case ${!name:-0} in *[!0-9]*)
            echo "error: $name is '${!name}', not a number; set it to one or unset it" >&2
            exit 2
            ;;
        esac
    done
}

# Prints this node's address on the network that leads to another one, IPv4 or IPv6.
address_towards() {
    "$python" -c 'import socket, sys
host = sys.argv[1].strip("[]")
try:
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing; chooses the route
        print(probe.getsockname()[0])
except OSError as error:
    sys.exit(f"error: no route to the first node at MASTER_ADDR={host}: {error}")' "$1"
}

# find_run_dir WORLD_SIZE ARGUMENTS… sets run_dir; a wrong configuration or layout ends the script here, once, rather
# than in every rank and every restart.
find_run_dir() {
    run_dir=$("$python" -m fusiontree.train --print-run-dir --world-size "${1:-1}" "${@:2}") || exit 2
}

# Reaches the ranks behind a launcher's process: replaced by launchers that do not pass signals on themselves.
pass_signal() { kill "-$1" "$2" 2>/dev/null; }

# Runs a launcher and passes signals on to it; sets code (its exit code) and signalled (the last signal, or nothing).
run_with_signals() {
    local child signal
    signalled="" code=0
    "$@" &
    child=$!
    for signal in USR1 TERM INT HUP; do
        # shellcheck disable=SC2064
        trap "signalled=$signal; pass_signal $signal $child" "$signal"
    done
    # A trapped signal ends wait early, with a code over 128, while the child still runs.
    while :; do
        wait "$child"
        code=$?
        kill -0 "$child" 2>/dev/null || break
    done
    trap - USR1 TERM INT HUP
}

# A launcher that was signalled ends with a code of its own; whether the run was saved is in its events.
saved_after_signal() {
    [ -n "$signalled" ] && tail -n 1 "$run_dir/events.jsonl" 2>/dev/null | grep -q '"event": "interrupted"'
}
