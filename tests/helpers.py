"""A model small enough for every test, and its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusiontree.checkpoint.config import CheckpointConfig
from fusiontree.checkpoint.saver import Saver
from fusiontree.models.config import ModelConfig
from fusiontree.models.initialization import initialize_model
from fusiontree.models.model import FusionTreeModel
from tests.tiny import changed, tiny_section

TINY = tiny_section(
    vocab_size=64,
    window_size=5,
    mamba={"d_state": 16, "n_groups": 2, "norm_groups": 2, "chunk_size": 8, "dt_init_range": [0.05, 0.5]},
)


def tiny_config(**overrides: Any) -> ModelConfig:
    """Return a model section of 32 channels and two layers; ``mamba`` may be given in part.

    ``layer_pattern`` sets ``num_layers`` too.
    """
    values = changed(TINY, **overrides)
    if overrides.get("layer_pattern") and "num_layers" not in overrides:
        values["num_layers"] = len(overrides["layer_pattern"])
    return ModelConfig.model_validate(values)


def tiny_model(seed: int = 0, scale: float = 3.0, **overrides: Any) -> FusionTreeModel:
    """Return an initialised tiny model in fp32.

    Matrices are ``scale`` times their usual size and the gate's last projection is not zero, so that every part
    matters to the logits.
    """
    model = FusionTreeModel(tiny_config(**overrides))
    initialize_model(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.up.weight"):
                parameter.normal_(0.0, 0.5, generator=generator)
            elif parameter.ndim == 2 and "conv" not in name:
                parameter.mul_(scale)
    return model


def save_checkpoint(
    checkpoints: Path, step: int, tensors: dict[str, Tensor], values: dict[str, Any], extra_files: Sequence[Path] = ()
) -> Path:
    """Write one checkpoint from a single process and return its folder.

    Raises:
        OSError: the checkpoint could not be written.
    """
    saver = Saver(checkpoints, CheckpointConfig(keep_last=0, async_=False))
    saver.save(step, tensors, values, extra_files, wait=True)
    (result,) = saver.poll()
    if result.error:
        raise OSError(result.error)
    return result.folder
