# Copy to slurm/site.sh (ignored by git) and set what your cluster wants. slurm/pretrain.sh and slurm/evaluate.sh read it
# before they queue a job and again inside the job.
# shellcheck shell=bash

# Options of sbatch that every job of yours needs; the command line of the scripts wins over them.
# SBATCH_OPTIONS="--account=myproject --partition=gpu --nodes=2 --gpus-per-node=8 --exclusive --time=24:00:00"

# Run in a job before python.
# module load cuda/13.0
# export FUSIONTREE_PYTHON=$HOME/fusiontree/.venv/bin/python
# export LAUNCHER=torchrun    # or deepspeed; see launchers/srun.sh
# export PREFLIGHT=1          # measure the network between the nodes before each start

# A container made from the Dockerfile (docs/cluster.md), with pyxis or with Apptainer.
# export FUSIONTREE_PYTHON=/usr/local/bin/fusiontree-python
# export SRUN_ARGS="--container-image=$HOME/fusiontree.sqsh --container-mounts=$HOME:$HOME,/shared:/shared --container-workdir=$PWD"
# export SRUN_ARGS="apptainer exec --nv --bind /shared $HOME/fusiontree.sif"

# The network between the nodes. NCCL finds it by itself on most clusters: set a variable only for the reason beside it.
# docs/cluster.md describes how to find the values. Each value here is an example.
#
# The nodes have several networks and the start hangs or is refused: the interface of `ip -brief address` that reaches the
# other nodes. NCCL takes prefixes (ib matches ib0 and ib1; =ib0 only ib0; ^docker all but docker*), gloo full names.
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0
#
# Some RDMA adapters of `ibstat` belong to storage or to another fabric: the adapters, with ports, that connect the GPUs.
# export NCCL_IB_HCA==mlx5_0:1,mlx5_1:1,mlx5_4:1,mlx5_5:1    # ^mlx5_2 takes all but these
#
# RDMA over Ethernet (RoCE) that fails with the address NCCL selects: the index of the RoCE v2 line of `show_gids`.
# export NCCL_IB_GID_INDEX=3
# RoCE or InfiniBand with several traffic classes: the class and service level that the administrators name.
# export NCCL_IB_TC=106
# export NCCL_IB_SL=0
#
# A large fabric on which jobs end with "retry exceeded" (completion error 12) although no cable is bad: each step up
# doubles the time before a lost packet is sent again. NCCL's own value is 20 in current versions.
# export NCCL_IB_TIMEOUT=22
#
# The log names an adapter without GDRDMA although the driver of the nodes supports GPUDirect RDMA: the largest distance
# between GPU and adapter at which NCCL may use it (PIX, PXB, PHB, SYS).
# export NCCL_NET_GDR_LEVEL=PHB
#
# For one job that looks for a fault, never for good: what NCCL selects, and TCP instead of RDMA. If the job runs with TCP,
# the fault is in the RDMA network or its settings. TCP is many times slower.
# export NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET
# export NCCL_IB_DISABLE=1
