#!/usr/bin/env bash
# One process a GPU (or a task) under Slurm's srun, without ssh: srun starts the processes, rank 0's node is where they
# meet. Run inside an allocation:
#
#   salloc -N2 --ntasks-per-node=8 --gpus-per-node=8
#   launchers/srun.sh --config configs/pretrain_v1.yaml training.max_steps=100
#
# FUSIONTREE_PYTHON  the python to run (default: .venv/bin/python beside the project, else python3)
# SRUN_ARGS          more arguments for srun: --container-image=…, --container-mounts=…, --cpu-bind=…
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "error: launchers/srun.sh runs inside a Slurm allocation; use sbatch slurm/pretrain.sh or salloc first" >&2
    exit 2
fi
python=${FUSIONTREE_PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=python3

# The processes learn their ranks from SLURM_PROCID; where they meet is set here. The port follows from the job id, so
# two jobs on one node do not meet each other.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# A node's name need not be an address; what Slurm itself reaches it by is.
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)}
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# A rank that fails ends the step: its peers would wait for it in a collective.
# shellcheck disable=SC2086
exec srun --kill-on-bad-exit=1 --export=ALL ${SRUN_ARGS:-} "$python" -m fusiontree.train "$@"
