# Copy to slurm/site.sh (ignored by git) and set what your cluster wants. slurm/pretrain.sh reads it before it queues
# the job and again inside the job.

# Options of sbatch that every job of yours needs; the command line of slurm/pretrain.sh wins over them.
# SBATCH_OPTIONS="--account=myproject --partition=gpu --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=8 --time=24:00:00"

# What a job runs before python.
# module load cuda/13.0
# export FUSIONTREE_PYTHON=$HOME/fusiontree/.venv/bin/python
# export SRUN_ARGS="--container-image=$HOME/fusiontree.sqsh --container-mounts=$HOME:$HOME"
# export NCCL_SOCKET_IFNAME=ib0
