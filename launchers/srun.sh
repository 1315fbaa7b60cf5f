#!/usr/bin/env bash
# All ranks of a Slurm allocation, without ssh: srun starts them, and rank 0's node is where they meet. Run inside an
# allocation (slurm/pretrain.sh does):
#
#   salloc -N2 --gpus-per-node=8 --exclusive
#   launchers/srun.sh --config configs/pretrain_v1.yaml training.max_steps=100
#
# LAUNCHER           srun (default): Slurm's own daemon on each node starts that node's ranks, and the exit code is theirs
#                    torchrun, deepspeed: srun starts one launchers/torchrun.sh or launchers/deepspeed.sh on each node
# PROCESSES          ranks on each node (default: --ntasks-per-node of the allocation, else its GPUs per node, else 1)
# LOG_DIR            folder for one log file per rank; without it all ranks write to the terminal
# SRUN_ARGS          more arguments for srun: --container-image=…, --container-mounts=…, --cpu-bind=…
# FUSIONTREE_PYTHON  the python to run (default: .venv/bin/python beside the project, else python3)
set -euo pipefail
# shellcheck source=launchers/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
answer_alone "${BASH_SOURCE[0]}" "$@"
if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "error: launchers/srun.sh runs inside a Slurm allocation; use slurm/pretrain.sh or salloc first" >&2
    exit 2
fi
place_in_slurm
PROCESSES=${PROCESSES:-1}
output=()
case ${LAUNCHER:-srun} in
srun)
    tasks=$PROCESSES command=("$python" -m "${MODULE:-fusiontree.train}")
    [ -z "${LOG_DIR:-}" ] || output=(--output="$LOG_DIR/job-$SLURM_JOB_ID.rank-%t.log" --open-mode=append)
    ;;
torchrun | deepspeed)
    tasks=1 command=("$root/launchers/$LAUNCHER.sh")
    unset NODE_RANK # each node's launcher has its own
    [ -z "${LOG_DIR:-}" ] || output=(--output="$LOG_DIR/job-$SLURM_JOB_ID.node-%n.log" --open-mode=append)
    ;;
*)
    echo "error: LAUNCHER=$LAUNCHER; it is srun, torchrun or deepspeed" >&2
    exit 2
    ;;
esac

if [ "${SLURM_CPUS_ON_NODE:-$PROCESSES}" -lt "$PROCESSES" ]; then
    echo "error: $PROCESSES ranks on a node where the job has $SLURM_CPUS_ON_NODE CPUs; queue it with --exclusive, or with" \
        "--ntasks-per-node=$PROCESSES and --cpus-per-task" >&2
    exit 2
fi
# srun no longer takes this over from the job by itself; a launcher needs the CPUs of all its ranks.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$((SLURM_CPUS_PER_TASK * PROCESSES / tasks))
# A rank that fails ends the step: its peers would wait for it in a collective.
# shellcheck disable=SC2086
exec srun --kill-on-bad-exit=1 --export=ALL --nodes="$NNODES" --ntasks="$((NNODES * tasks))" --ntasks-per-node="$tasks" \
    ${output[@]+"${output[@]}"} ${SRUN_ARGS:-} "${command[@]}" "$@"
