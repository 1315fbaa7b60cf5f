# Copy to slurm/site.sh (ignored by git) and set what your cluster wants. slurm/pretrain.sh and slurm/evaluate.sh read it
# before they queue a job and again inside the job.
# shellcheck shell=bash

# Options of sbatch that every job of yours needs; the command line of the scripts wins over them.
# SBATCH_OPTIONS="--account=myproject --partition=gpu --nodes=2 --gpus-per-node=8 --exclusive --time=24:00:00"

# What a job runs before python.
# module load cuda/13.0
# export FUSIONTREE_PYTHON=$HOME/fusiontree/.venv/bin/python
# export SRUN_ARGS="--container-image=$HOME/fusiontree.sqsh --container-mounts=$HOME:$HOME"
# export LAUNCHER=torchrun    # or deepspeed; see launchers/srun.sh
# export PREFLIGHT=1          # measure the network between the nodes before each start
# export NCCL_SOCKET_IFNAME=ib0
