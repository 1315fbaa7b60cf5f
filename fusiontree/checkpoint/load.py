"""Loading: the newest checkpoint whose files match their hashes, into live tensors or into a single-device model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from fusiontree.checkpoint.folders import MANIFEST, complete_checkpoints
from fusiontree.checkpoint.manifest import CheckpointDamage, verify
from fusiontree.checkpoint.save import STATE
from fusiontree.models.config import ModelConfig
from fusiontree.models.mamba import SSMParameters
from fusiontree.models.model import FusionTreeModel
from fusiontree.utils.errors import UserError, nearest


def newest_good(checkpoints: Path, report: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint that verifies, or None if there is no checkpoint at all.

    Rank 0 reads the files and tells the others. Damaged checkpoints are passed over loudly and left in place.

    Args:
        checkpoints: RUN/checkpoints.
        report: called on rank 0 with a message for every damaged checkpoint.

    Raises:
        CheckpointDamage: there are checkpoints and none is good.
    """
    answer: list[Path | str | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        folders = complete_checkpoints(checkpoints)
        for folder in reversed(folders):
            try:
                verify(folder)
            except CheckpointDamage as damage:
                report(f"damaged checkpoint passed over: {damage}")
                continue
            answer = [folder]
            break
        else:
            answer = [f"none of the {len(folders)} checkpoints in {checkpoints} is whole"] if folders else [None]
    if dist.is_initialized():
        dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], str):
        raise CheckpointDamage(answer[0] + "; restore one of them or start in a new run_dir")
    return answer[0]


def read_state(folder: Path) -> dict[str, Any]:
    """Return the checkpoint's small values: step, data position, configuration."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def saved_tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and type of every tensor that the checkpoint holds, in the order they were saved."""
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in saved.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def load_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill ``tensors`` in place from the checkpoint; DTensors take their own shard, whatever layout saved it.

    Raises:
        CheckpointDamage: a tensor is missing in the checkpoint or has another shape.
    """
    reader = dcp.FileSystemReader(folder)
    saved = reader.read_metadata().state_dict_metadata
    for name, tensor in tensors.items():
        size = getattr(saved.get(name), "size", None)
        if size is None:
            raise CheckpointDamage(f"{folder} holds no tensor '{name}'{nearest(name, saved)}")
        if tuple(size) != tuple(tensor.shape):
            raise CheckpointDamage(f"{folder}: '{name}' has shape {tuple(size)}, the model wants {tuple(tensor.shape)}")
    with warnings.catch_warnings():
        # One process without a process group is meant when a model is loaded for generation.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint folder that ``path`` names: itself, or the newest complete one of a run folder.

    Raises:
        UserError: there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    for folder in (path / "checkpoints", path):
        complete = complete_checkpoints(folder)
        if complete:
            return complete[-1]
    if not path.exists():
        near = nearest(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise UserError(f"checkpoint '{path}' does not exist{near}")
    raise UserError(f"'{path}' holds no complete checkpoint; give a run folder or RUN/checkpoints/step-XXXXXXXX")


def load_model(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[FusionTreeModel, dict[str, Any]]:
    """Load a model for one device, ready for generation.

    Args:
        path: a run folder (its newest checkpoint) or a checkpoint folder.
        device: where the model lives.
        dtype: type of its weights; the state space parameters stay fp32.

    Returns:
        The model in evaluation mode, and the resolved configuration it was trained with.

    Raises:
        UserError: there is no checkpoint there.
        CheckpointDamage: a file differs from its recorded hash.
    """
    folder = find_checkpoint(Path(path))
    verify(folder)
    config = read_state(folder)["config"]
    with torch.device("meta"):
        model = FusionTreeModel(ModelConfig.model_validate(config["model"]))
    model.to_empty(device=device)
    model.requires_grad_(False)
    load_tensors(folder, {f"model.{name}": p.detach() for name, p in model.named_parameters()})
    for module in model.modules():
        if not isinstance(module, SSMParameters):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    return model.eval(), config
