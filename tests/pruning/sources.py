"""A model in memory as a checkpoint, and held-out rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusiontree.convert.reader import CheckpointSource, Entry
from fusiontree.data.batch import MicroBatch
from fusiontree.models.model import FusionTreeModel


class ModelSource(CheckpointSource):
    """A model's parameters as a checkpoint."""

    def __init__(self, model: FusionTreeModel) -> None:
        self.values = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
        self.config = {"model": model.config.model_dump(mode="json")}
        self.files = []
        self.entries = {name: Entry(tuple(value.shape), value.dtype) for name, value in self.values.items()}

    def read(self, name: str) -> Tensor:
        return self.values[name]


def model_of(source: CheckpointSource) -> FusionTreeModel:
    """The model that a source's weights make."""
    model = FusionTreeModel(source.model_config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.read(f"model.{name}"))
    return model.eval()


def rows(count: int = 2, length: int = 24, batches: int = 2) -> list[MicroBatch]:
    """Rows of random tokens, each one document."""
    found = []
    for seed in range(batches):
        ids_BT = torch.randint(0, 64, (count, length + 1), generator=torch.Generator().manual_seed(seed))
        ones: Any = torch.ones(count)
        positions_BS = torch.arange(length).expand(count, length).contiguous()
        found.append(
            MicroBatch(ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous(), positions_BS, ones.long(), ones, ones)
        )
    return found


def repeated(batches: list[MicroBatch]) -> Any:
    """A function that returns the rows anew at each call."""

    def read() -> Iterator[MicroBatch]:
        return iter(batches)

    return read
