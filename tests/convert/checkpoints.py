"""Small training checkpoints to convert."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusiontree.checkpoint.load import load_model
from fusiontree.checkpoint.reader import CheckpointReader
from fusiontree.models.model import FusionTreeModel
from tests.helpers import save_checkpoint, tiny_model
from tools.convert_checkpoint import main

BYTE_TOKENIZER = {
    "kind": "byte",
    "name": "byte",
    "vocab_size": 257,
    "eos_id": 256,
    "sha256": hashlib.sha256(b"utf-8 bytes, eos 256").hexdigest(),
    "file": None,
}


def training_run(folder: Path, step: int = 7, **overrides: Any) -> FusionTreeModel:
    """Save a run with one checkpoint, moments of random numbers and a byte tokenizer; return its model."""
    model = tiny_model(**{"vocab_size": 264, **overrides}).eval()
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        tensors[f"optimizer.exp_avg.{name}"] = torch.randn(parameter.shape, generator=generator)
        tensors[f"optimizer.exp_avg_sq.{name}"] = torch.rand(parameter.shape, generator=generator)
    values = {
        "config": {"model": model.config.model_dump(mode="json")},
        "tokens": 4096,
        "data": {"row": 3},
        "skipped_in_a_row": 0,
        "engine": {"optimizer_step": step},
        "rng": {"torch_cpu": ""},
    }
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = folder / "tokenizer_info.json"
    tokenizer.write_text(json.dumps(BYTE_TOKENIZER))
    save_checkpoint(folder / "checkpoints", step, tensors, values, [tokenizer])
    return model


def all_tensors(run: Path) -> dict[str, Tensor]:
    """Every tensor of a run's only checkpoint."""
    (folder,) = (run / "checkpoints").iterdir()
    reader = CheckpointReader(folder)
    return {name: reader.read(name) for name in reader.tensors}


def convert(*arguments: Any) -> None:
    """Run the tool as a user does, but without loading transformers in a process of its own each time."""
    if ("hf" in arguments or "--map" in arguments) and "--check-logits" not in arguments:
        arguments = (*arguments, "--check-logits", "off")
    assert main([str(argument) for argument in arguments]) == 0


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether both hold the same names with the same bits."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


__all__ = ["all_tensors", "convert", "equal", "load_model", "training_run"]
