#!/usr/bin/env bash
#SBATCH --job-name=fusiontree
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#
# Pretrain on a Slurm cluster; survives its time limit, preemption and lost nodes by saving, requeueing and resuming.
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --time=24:00:00 slurm/pretrain.sh CONFIG [section.key=value …]
#   slurm/pretrain.sh [sbatch options --] CONFIG [section.key=value …]     checks first, then queues with slurm/site.sh
#
# The exit code of a job tells what became of the run: 0 it reached training.max_steps; 75 it saved and was requeued;
# anything else it failed, and its log says why. A failed run continues from its last checkpoint when queued again.
set -uo pipefail

usage() {
    sed -n '7,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
}

# Inside a job Slurm runs a copy of this script from its spool, so the project is where sbatch was called.
if [ -n "${SLURM_JOB_ID:-}" ]; then root=${FUSIONTREE_ROOT:-$SLURM_SUBMIT_DIR}; else root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd); fi
if [ ! -f "$root/fusiontree/train.py" ]; then
    echo "error: '$root' is not the project; call sbatch from its top folder or set FUSIONTREE_ROOT" >&2
    exit 2
fi
SBATCH_OPTIONS=""
# shellcheck disable=SC1091
[ -f "$root/slurm/site.sh" ] && source "$root/slurm/site.sh"
python=${FUSIONTREE_PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=python3

# Options of sbatch come before a '--'.
options=()
for argument in "$@"; do
    if [ "$argument" = "--" ]; then
        while [ "$1" != "--" ]; do options+=("$1"); shift; done
        shift
        break
    fi
done
[ $# -ge 1 ] || usage
config=$1
shift

cd "$root" || exit 2
if ! "$python" -m fusiontree.train --check --config "$config" "$@"; then
    echo "error: not started; mend the above first" >&2
    exit 2
fi

if [ -z "${SLURM_JOB_ID:-}" ]; then
    # shellcheck disable=SC2086
    exec sbatch ${SBATCH_OPTIONS} ${options[@]+"${options[@]}"} "$root/slurm/pretrain.sh" "$config" "$@"
fi

restarts=${SLURM_RESTART_COUNT:-0}
echo "job $SLURM_JOB_ID start $restarts on $SLURM_JOB_NODELIST: $config $*"
"$root/launchers/srun.sh" --config "$config" "$@" &
step=$!
# Slurm's warning reaches this shell alone. srun passes it on to every rank; they agree on a step, save and leave.
warned=""
trap 'warned=yes; echo "time limit near: asking the ranks to save"; kill -USR1 $step' USR1
trap 'echo "asked to end: passing it on"; kill -TERM $step' TERM
# A trapped signal ends wait early with a code over 128 while srun still runs.
while :; do
    wait "$step"
    code=$?
    kill -0 "$step" 2>/dev/null || break
done

if [ "$code" -eq 75 ] && [ -z "$warned" ]; then
    # scancel, or a preemption that Slurm itself requeues: going back into the queue would undo what was asked.
    echo "saved on a signal that was no time limit; queue the job again to continue"
elif [ "$code" -eq 75 ]; then
    echo "saved; requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
elif [ "$code" -eq 0 ]; then
    echo "job $SLURM_JOB_ID finished the run"
else
    echo "job $SLURM_JOB_ID failed with exit code $code; queue it again to continue from the last checkpoint" >&2
fi
exit "$code"
