# Image of a training job: PyTorch with CUDA, and FusionTree with its optional packages. docs/cluster.md describes its use.
#
#   docker build --tag fusiontree .
#   docker build --tag fusiontree --build-arg BASE=pytorch/pytorch:2.12.0-cuda13.0-cudnn9-devel --build-arg EXTRAS=cuda,wandb .
#
# A devel image: Triton and DeepSpeed compile small extensions at run time, for which they need nvcc and a C++ compiler.
ARG BASE=pytorch/pytorch:2.11.0-cuda13.0-cudnn9-devel
FROM ${BASE}

# Extras of setup.py. cuda needs GPUs of compute capability 9.0 or newer.
ARG EXTRAS=cuda,deepspeed,hf,s3,gs,wandb,tensorboard

# DeepSpeed compiles nothing while it is installed. The base image may have Python from its Linux distribution, into which
# pip installs only with this permission.
ENV DS_BUILD_OPS=0 PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

WORKDIR /opt/fusiontree
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY configs configs
COPY fusiontree fusiontree

# The base image's torch stays: it was built for the image's CUDA.
RUN python3 -c 'import torch; print(f"torch=={torch.__version__}")' > /tmp/constraints.txt \
    && python3 -m pip install --constraint /tmp/constraints.txt ".[${EXTRAS}]" \
    && rm /tmp/constraints.txt \
    && fusiontree --help > /dev/null

# The same path to Python in every base image, for FUSIONTREE_PYTHON: the launchers name it outside the container.
RUN printf '#!/bin/sh\nexec "%s" "$@"\n' "$(command -v python3)" > /usr/local/bin/fusiontree-python \
    && chmod 755 /usr/local/bin/fusiontree-python

# No user and no entry point: enroot and Apptainer run the container as the calling user, and srun names the command.
WORKDIR /workspace
