"""Our training checkpoint as source and target."""

from __future__ import annotations

import base64
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from fusiontree.checkpoint.convert.source import (
    MODEL,
    MOMENTS,
    TOKENIZER_FILES,
    Entry,
    Source,
    Stream,
    checked,
)
from fusiontree.checkpoint.folders import MANIFEST, folder_step, step_folder
from fusiontree.checkpoint.load import find_checkpoint, load_tensors, read_state, saved_tensors
from fusiontree.checkpoint.manifest import file_entries, verify, write_manifest
from fusiontree.checkpoint.save import STATE
from fusiontree.parallel.shards import GlobalTensor
from fusiontree.utils.files import atomic_write

_STEP_NAME = re.compile(r"step-\d{8}")


class TrainingCheckpoint(Source):
    """RUN/checkpoints/step-XXXXXXXX, every file checked against its recorded hash."""

    def __init__(self, path: Path) -> None:
        """Open the folder, or the newest checkpoint of a run folder.

        Raises:
            UserError: there is no checkpoint, or its tensors are not those of its configuration.
            CheckpointDamage: a file differs from its recorded hash.
        """
        self.folder = find_checkpoint(path)
        verify(self.folder)
        values = read_state(self.folder)
        self.config = values.pop("config")
        self.state = values
        self.files = [self.folder / name for name in TOKENIZER_FILES if (self.folder / name).is_file()]
        self.entries = {name: Entry(*entry) for name, entry in saved_tensors(self.folder).items()}
        self.entries = checked(self.entries, self.model_config, str(self.folder))
        self._ahead: dict[str, Tensor] = {}
        self._order = list(self.entries)

    def read(self, name: str) -> Tensor:
        """Return one tensor; small ones that follow it are read along, up to the size of the largest."""
        if name not in self._ahead:
            self._ahead.clear()
            limit = max(entry.nbytes for entry in self.entries.values())
            wanted: dict[str, Tensor] = {}
            size = 0
            for near in self._order[self._order.index(name) :]:
                size += self.entries[near].nbytes
                if wanted and size > limit:
                    break
                wanted[near] = torch.empty(self.entries[near].shape, dtype=self.entries[near].dtype)
            load_tensors(self.folder, wanted)
            self._ahead = wanted
        return self._ahead.pop(name)


class LazyTensor(GlobalTensor):
    """A tensor whose pieces are made when DCP writes them, so that no more than one exists at a time."""

    make: Callable[[tuple[int, ...]], Tensor]
    shapes: dict[tuple[int, ...], tuple[int, ...]]

    @classmethod
    def of(
        cls, entry: Entry, make: Callable[[tuple[int, ...]], Tensor], shapes: dict[tuple[int, ...], tuple[int, ...]]
    ) -> LazyTensor:
        """Return a tensor of rectangles: ``shapes`` says where and how large, ``make(offset)`` returns one."""
        tensor = cls(entry.shape, [], entry.dtype)
        assert isinstance(tensor, LazyTensor)
        tensor.make, tensor.shapes = make, shapes
        return tensor

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offset), torch.Size(shape)) for offset, shape in self.shapes.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.make(tuple(index.offset or ()))


def write_dcp(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write ``tensors`` (lazy ones, too) as a DCP folder.

    One file a tensor: DCP keeps all tensors of a file in memory until the file is complete.
    """
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=False, sync_files=True, per_thread_copy_ahead=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
        dcp.save(tensors, storage_writer=writer, no_dist=True)


def whole(entry: Entry, make: Callable[[], Tensor]) -> LazyTensor:
    """Return a lazy tensor of one piece."""
    origin = (0,) * len(entry.shape)
    return LazyTensor.of(entry, lambda offset: make(), {origin: entry.shape})


def write(folder: Path, stream: Stream, *, config_yaml: str | None, name: str) -> None:
    """Write a run folder with one checkpoint, or one checkpoint folder.

    A source without moments gets zeros, so that training can go on from it as from step 0.

    Args:
        folder: temporary folder that becomes the target.
        stream: the tensors.
        config_yaml: the run's whole configuration as a file, if it is known.
        name: the target's name; ``step-XXXXXXXX`` makes a checkpoint folder, any other name a run folder.
    """
    source = stream.source
    values = source.state or fresh_state()
    if _STEP_NAME.fullmatch(name):
        values = {**values, "step": folder_step(Path(name))} if source.state is None else values
        target = folder
    else:
        target = step_folder(folder / "checkpoints", values["step"])
        target.mkdir(parents=True)
        for file in source.files:
            shutil.copyfile(file, folder / file.name)
        if config_yaml is not None:
            with atomic_write(folder / "config.yaml") as out:
                out.write(config_yaml)
    tensors: dict[str, Tensor] = {}
    for tensor in source.entries:
        tensors[tensor] = whole(stream.entry(tensor), lambda tensor=tensor: stream.read(tensor))  # type: ignore[misc]
    if not source.has_optimizer:
        tensors.update(_zero_moments(source.entries))
    write_dcp(target, tensors)
    _finish(target, values | {"config": source.config}, source.files)


def fresh_state() -> dict[str, Any]:
    """Return the small values of a run that has not made a step."""
    rng = base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()
    return {
        "step": 0,
        "tokens": 0,
        "data": None,
        "skipped_in_a_row": 0,
        "engine": {"optimizer_step": 0},
        "rng": {"torch_cpu": rng},
    }


def _zero_moments(entries: dict[str, Entry]) -> dict[str, Tensor]:
    zeros: dict[str, Tensor] = {}
    for name, (shape, _) in entries.items():
        for prefix in MOMENTS:
            entry = Entry(shape, torch.float32)
            zeros[prefix + name.removeprefix(MODEL)] = whole(entry, lambda shape=shape: torch.zeros(shape))  # type: ignore[misc]
    return zeros


def _finish(target: Path, values: dict[str, Any], files: Iterable[Path]) -> None:
    for file in files:
        shutil.copyfile(file, target / file.name)
    with atomic_write(target / STATE) as out:
        json.dump(values, out, indent=1)
    written = [file for file in target.rglob("*") if file.is_file() and file.name != MANIFEST]
    write_manifest(target, file_entries(written, target))
