"""Saving: torch DCP into a temporary folder, hashes last, then a rename."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from fusiontree.checkpoint.folders import partial_folder, step_folder
from fusiontree.checkpoint.manifest import file_entries, write_manifest
from fusiontree.utils.files import atomic_write, fsync_directory

STATE = "state.json"
"""Small values of the training state: step, data position, configuration."""


def save_checkpoint(
    checkpoints: Path, step: int, tensors: dict[str, Tensor], values: dict[str, Any], extra_files: Sequence[Path] = ()
) -> Path:
    """Write a checkpoint; all ranks call this together.

    Args:
        checkpoints: RUN/checkpoints, on a file system that all ranks share.
        step: the optimizer step it belongs to.
        tensors: this rank's view of the state (plain tensors are equal on all ranks, DTensors are shards).
        values: JSON-able state, the same on all ranks.
        extra_files: small files to put beside the tensors (a tokenizer).

    Returns:
        The folder, complete under its final name; a reader sees the whole checkpoint or none.
    """
    final, partial = step_folder(checkpoints, step), partial_folder(checkpoints, step)
    main = not dist.is_initialized() or dist.get_rank() == 0
    if main:
        checkpoints.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    _barrier()
    writer = dcp.FileSystemWriter(partial, single_file_per_rank=True, sync_files=True)
    dcp.save(tensors, storage_writer=writer)
    if main:
        for extra in extra_files:
            shutil.copy2(extra, partial / extra.name)
        with atomic_write(partial / STATE) as file:
            json.dump({"step": step, **values}, file, indent=1)
        files = [f for f in partial.rglob("*") if f.is_file()]
        write_manifest(partial, file_entries(files, partial))
        if final.exists():  # a resumed run came to this step again; the same state, so the newer write may replace it
            shutil.rmtree(final)
        partial.rename(final)
        fsync_directory(checkpoints)
    _barrier()
    return final


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
