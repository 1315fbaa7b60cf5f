#!/usr/bin/env bash
#SBATCH --job-name=fusiontree-evaluate
#SBATCH --requeue
#SBATCH --open-mode=append
#
# Evaluate a checkpoint on one node of a Slurm cluster.
#
#   slurm/evaluate.sh [--gpus-per-node=1 --time=1:00:00 …] --checkpoint=RUN [options of python -m fusiontree.evaluate]
#       checks checkpoint, data and options, then queues the job; options of sbatch come first and are written --a=b;
#       slurm/site.sh holds those that every job of yours needs; --dry-run shows the command instead of queueing
#   sbatch --gpus-per-node=1 slurm/evaluate.sh --checkpoint=RUN …        the same, checked when the job starts
#
# The table and the JSON object are in Slurm's log of the job; the object also in the file that --output names.
# Exit codes: 0 done; 2 something given is wrong; anything else it failed. A job that lost its node starts again.
set -uo pipefail

if [ -n "${SLURM_JOB_ID:-}" ]; then home=${FUSIONTREE_ROOT:-$SLURM_SUBMIT_DIR}; else home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd); fi
if [ ! -f "$home/slurm/functions.sh" ]; then
    echo "error: '$home' is not the project; call sbatch from its top folder or set FUSIONTREE_ROOT" >&2
    exit 2
fi
# shellcheck source=slurm/functions.sh
source "$home/slurm/functions.sh"

options=() chain=1 dry=""
while [ $# -gt 0 ] && [[ $1 != --checkpoint* ]]; do
    if [ "$1" = --dry-run ]; then dry=yes; else options+=("$1"); fi
    shift
done
if [ $# -eq 0 ]; then
    sed -n '6,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
fi
arguments=("$@")
cd "$root" || exit 2
if ! ask fusiontree.evaluate --check "$@"; then
    echo "error: not started; mend the above first" >&2
    exit 2
fi
if [ -z "${SLURM_JOB_ID:-}" ]; then queue "$root/slurm/evaluate.sh"; fi

# One process: a checkpoint is evaluated on one device.
# shellcheck disable=SC2086
srun --nodes=1 --ntasks=1 ${SRUN_ARGS:-} "$python" -m fusiontree.evaluate "$@"
code=$?
[ "$code" -eq 0 ] || echo "job $SLURM_JOB_ID failed with exit code $code" >&2
exit "$code"
