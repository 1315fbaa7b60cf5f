#!/usr/bin/env bash
#SBATCH --job-name=fusiontree
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#
# Pretrain on a Slurm cluster; survives its time limit, preemption and lost nodes by saving, requeueing and resuming.
#
#   slurm/pretrain.sh [--nodes=2 --gpus-per-node=8 --exclusive --time=24:00:00 …] CONFIG [section.key=value …]
#       checks configuration, layout, data and run folder, then queues the job; options of sbatch are written --a=b, or
#       end with a --; slurm/site.sh holds those that every job of yours needs (see slurm/site.example.sh)
#   sbatch --nodes=2 --gpus-per-node=8 --exclusive --time=24:00:00 slurm/pretrain.sh CONFIG [section.key=value …]
#       the same, checked when the job starts
#
#   slurm/pretrain.sh --dry-run …         checks, and shows the ranks of a job and the command that would queue it
#
# Runs longer than one job: by default a job requeues itself as often as needed. Where a cluster forbids that,
#   slurm/pretrain.sh --chain=5 …         queues five jobs, each for the case that the one before did not finish
#   slurm/pretrain.sh --array=1-5%1 …     the same as an array, one at a time
#
# LAUNCHER=srun|torchrun|deepspeed  what starts the ranks on each node (launchers/srun.sh; default srun)
# PROCESSES=N    ranks on each node (default: --ntasks-per-node, else the GPUs per node, else 1); set it, instead of
#                --ntasks-per-node, with a range of nodes such as --nodes=1-2, so that a job that lost one goes on
# PREFLIGHT=1    measure the links between the nodes before training, and stop at a dead one (python -m
#                fusiontree.preflight)
# Logs: RUN/logs, one file per rank; Slurm's own file has the messages of this script.
#
# The exit code of a job tells what became of the run: 0 it reached training.max_steps; 75 it was saved and waits for
# the next start (requeued, next of the chain, or queued again by you); 2 something given is wrong; anything else it
# failed, and its log says why. A failed run continues from its last checkpoint when queued again.
set -uo pipefail

usage() {
    sed -n '7,33s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
}

# Inside a job Slurm runs a copy of this script from its spool, so the project is where sbatch was called.
if [ -n "${SLURM_JOB_ID:-}" ]; then home=${FUSIONTREE_ROOT:-$SLURM_SUBMIT_DIR}; else home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd); fi
if [ ! -f "$home/slurm/functions.sh" ]; then
    echo "error: '$home' is not the project; call sbatch from its top folder or set FUSIONTREE_ROOT" >&2
    exit 2
fi
# shellcheck source=slurm/functions.sh
source "$home/slurm/functions.sh"

split_arguments "$@"
[ ${#arguments[@]} -ge 1 ] || usage
config=${arguments[0]}
overrides=("${arguments[@]:1}")
cd "$root" || exit 2

# Every number of nodes that the job may get must fit the layout.
worlds=$(world_sizes) || exit 2
for world in $worlds; do
    if ! ask fusiontree.train --check --world-size "$world" --config "$config" ${overrides[@]+"${overrides[@]}"}; then
        echo "error: not started; mend the above first" >&2
        exit 2
    fi
done
if [ -z "${SLURM_JOB_ID:-}" ] && [ -n "$dry" ]; then
    # shellcheck disable=SC2086
    echo "each job starts $(echo $worlds | sed 's/ / or /g') ranks by LAUNCHER=${LAUNCHER:-srun}"
fi
if [ -z "${SLURM_JOB_ID:-}" ]; then queue "$root/slurm/pretrain.sh"; fi

run_dir=$(ask fusiontree.train --print-run-dir --world-size "$world" --config "$config" ${overrides[@]+"${overrides[@]}"}) || exit 2
export LOG_DIR=${LOG_DIR:-$run_dir/logs}
mkdir -p "$LOG_DIR" || exit 2
echo "job $SLURM_JOB_ID start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST: $config ${overrides[*]-}; logs in $LOG_DIR"
if [ -n "${PREFLIGHT:-}" ] && ! "$root/launchers/preflight.sh" --output "$LOG_DIR/preflight.json"; then
    echo "job $SLURM_JOB_ID failed: the network between its nodes is not fit for training (above)" >&2
    exit 1
fi

# Slurm's warning reaches this shell alone. srun passes it on to every rank; they agree on a step, save and leave.
pass_signal() {
    if [ "$1" = USR1 ]; then echo "time limit near: asking the ranks to save"; else echo "SIG$1: passing it on"; fi
    kill "-$1" "$2"
}
run_with_signals "$root/launchers/srun.sh" --config "$config" ${overrides[@]+"${overrides[@]}"}
# A rank that was warned while it still loaded, or a launcher that came late, leaves with a code of its own.
if [ "$signalled" = USR1 ] && [ "$code" -ne 0 ] && [ "$code" -ne 2 ]; then code=75; fi
if [ "$code" -ne 0 ] && saved_after_signal; then code=75; fi

if [ "$code" -eq 75 ] && [ "$signalled" != USR1 ]; then
    # scancel, or a preemption that Slurm itself requeues: going back into the queue would undo what was asked.
    echo "saved on a signal that was no time limit; queue the job again to continue"
elif [ "$code" -eq 75 ] && continued_elsewhere; then
    echo "saved; the next job of the chain goes on"
elif [ "$code" -eq 75 ]; then
    echo "saved; requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
elif [ "$code" -eq 0 ]; then
    echo "job $SLURM_JOB_ID finished the run"
    [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"
else
    show_errors "$LOG_DIR"
    echo "job $SLURM_JOB_ID failed with exit code $code; queue it again to continue from the last checkpoint" >&2
fi
exit "$code"
