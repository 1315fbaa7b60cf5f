"""Megatron-core's distributed checkpoint (``torch_dist``) of a FusionTree model, split for a tensor parallel size.

It is a torch DCP folder with an additional ``metadata.json`` and ``common.pt``. This module writes it tensor by tensor;
megatron-core's writer needs the full state in memory, and a GPU. Keys are FusionTree's names. A packed projection has
one key per block (``model.layers.0.mamba.in_proj.weight.z``, ``.x``, ``.dt``), as in Megatron's Mamba mixers, so every
key is an even grid that ``ShardedTensor.from_rank_offsets(key, part, (axis, tp_rank, tp))`` reads at any tp.
States of the optimizer are under ``optimizer.state.exp_avg.KEY``, where Megatron's reshardable optimizer keeps them.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusiontree.checkpoint.cover import first_overlap
from fusiontree.checkpoint.metadata import SavedTensor, read_metadata
from fusiontree.checkpoint.open_files import OpenFiles
from fusiontree.convert.dcp import Lazy, write_dcp
from fusiontree.convert.hf_tokenizer import tokenizer_files
from fusiontree.convert.reader import (
    MODEL,
    CheckpointSource,
    Entry,
    Stream,
    checked,
    parameter_shapes,
    state_prefix,
    stored_values,
    write_companions,
)
from fusiontree.models.config import ModelConfig
from fusiontree.models.mixers.split import split_of
from fusiontree.utils.errors import UserError
from fusiontree.utils.files import write_json

KIND = "metadata.json"
_MASTER = "optimizer.state.fp32_param." + MODEL
"""Prefix of Megatron's fp32 master weights of bf16 weights."""


class BlockPlace(NamedTuple):
    """One block of a parameter, of which each tensor parallel rank holds an equal contiguous part."""

    name: str | None
    """None if the parameter has only one block."""
    axis: int
    start: int
    """First row (or column) in the parameter."""
    shape: tuple[int, ...]
    parts: int
    """Number of parts that the block is split into; 1 if it is replicated."""

    def of(self, parameter: Tensor) -> Tensor:
        """Return a view of the block in the full parameter."""
        return parameter.narrow(self.axis, self.start, self.shape[self.axis])

    def chunks(self) -> dict[tuple[int, ...], tuple[int, ...]]:
        """Return offset and shape of each part in the block."""
        length = self.shape[self.axis] // self.parts
        shape = (*self.shape[: self.axis], length, *self.shape[self.axis + 1 :])
        zeros = (0,) * len(self.shape)
        return {(*zeros[: self.axis], part * length, *zeros[self.axis + 1 :]): shape for part in range(self.parts)}


def blocks_of(name: str, shape: tuple[int, ...], config: ModelConfig, tp: int) -> list[BlockPlace]:
    """Return the blocks of a parameter (its name without ``model.``) in order."""
    split = split_of(name, config)
    if split is None:
        return [BlockPlace(None, 0, 0, shape, 1)]
    parts = tp if split.is_owned(tp) else 1
    found, start = [], 0
    for block in split.blocks:
        block_shape = (*shape[: split.axis], block.size, *shape[split.axis + 1 :])
        found.append(BlockPlace(block.name if len(split.blocks) > 1 else None, split.axis, start, block_shape, parts))
        start += block.size
    assert start == shape[split.axis], f"blocks of {name} make {start} of {shape}"
    return found


def is_megatron(path: Path) -> bool:
    """Return whether a folder is a distributed checkpoint of Megatron-core, judged by file names."""
    return (path / KIND).is_file() and (path / "common.pt").is_file()


def write(folder: Path, stream: Stream, *, tp: int) -> None:
    """Write the checkpoint; every tensor parallel rank's part of a block is a separate DCP chunk."""
    source = stream.source
    config = source.model_config
    lazy: dict[str, Lazy] = {}
    reader, prefixes = _OneAtATime(stream), _prefixes(source)
    for name in source.entries:
        ours, theirs = next(pair for pair in prefixes.items() if name.startswith(pair[0]))
        entry = stream.entry(name)
        for block in blocks_of(name.removeprefix(ours), entry.shape, config, tp):
            key = _key(theirs + name.removeprefix(ours), block)
            lazy[key] = Lazy(
                Entry(block.shape, entry.dtype),
                block.chunks(),
                lambda offset, name=name, block=block: reader.part(name, block, offset),  # type: ignore[misc]
            )
    write_dcp(folder, lazy, index=False)
    step = (source.state or {}).get("step", 0)
    torch.save({"iteration": step, "checkpoint_version": 3.0}, folder / "common.pt")
    kind = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    write_json(folder / KIND, {**kind, "common_backend": "torch", "common_backend_version": 1})
    write_companions(folder, source)


class _OneAtATime:
    """Returns the parts of a tensor and reads the tensor only once."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._name: str | None = None
        self._tensor: Tensor | None = None

    def part(self, name: str, block: BlockPlace, offset: tuple[int, ...]) -> Tensor:
        if self._name != name:
            self._tensor = None  # before the next tensor is read
            self._name, self._tensor = name, self._stream.read(name)
        assert self._tensor is not None
        shape = block.chunks()[offset]
        part = block.of(self._tensor).narrow(block.axis, offset[block.axis], shape[block.axis])
        return part.contiguous()


class MegatronFolder(CheckpointSource):
    """A folder written by :func:`write`, or by Megatron-core itself under the same keys."""

    def __init__(self, path: Path, config: dict[str, Any] | None) -> None:
        """Open the folder; nothing in it is executed.

        Args:
            path: of the folder.
            config: full configuration; needed if the folder does not contain one.

        Raises:
            UserError: no configuration is known, or the keys do not match the model.
            CheckpointDamage: the metadata cannot be read.
        """
        self.config, self.state = stored_values(path, config)
        self.files = tokenizer_files(path)
        self._saved = read_metadata(path)
        self._open = OpenFiles(path)
        self._blocks: dict[str, list[tuple[str, BlockPlace]]] = {}
        entries: dict[str, Entry] = {}
        model = self.model_config
        for name, shape in parameter_shapes(model).items():
            for ours, theirs in _prefixes(self).items():
                if ours == MODEL and any(key.startswith(_MASTER + name) for key in self._saved):
                    theirs = _MASTER
                blocks = [(_key(theirs + name, block), block) for block in blocks_of(name, shape, model, 1)]
                held = [key for key, _ in blocks if key in self._saved]
                if not held and ours != MODEL:
                    continue
                self._check(path, blocks)
                entries[ours + name] = Entry(shape, self._saved[blocks[0][0]].dtype)
                self._blocks[ours + name] = blocks
        self.entries = checked(entries, model, str(path))

    def _check(self, path: Path, blocks: list[tuple[str, BlockPlace]]) -> None:
        for key, block in blocks:
            if key not in self._saved:
                raise UserError(f"{path} lacks '{key}', so it does not hold the model that its configuration describes")
            if self._saved[key].shape != block.shape:
                raise UserError(
                    f"{path}: '{key}' has shape {self._saved[key].shape}, the model wants {block.shape}; use the "
                    f"configuration that these weights were saved with"
                )
            chunks = self._saved[key].chunks
            held = sum(math.prod(chunk.shape) for chunk in chunks)
            if first_overlap([(chunk.offset, chunk.shape) for chunk in chunks]) or held != math.prod(block.shape):
                raise UserError(
                    f"{path}: the parts of '{key}' overlap, or hold {held} of its {math.prod(block.shape)} values; "
                    f"copy it again"
                )
            for chunk in chunks:
                file = path / chunk.file
                if not file.is_file() or chunk.start + chunk.length > file.stat().st_size:
                    raise UserError(f"{file} is missing, or ends before a part of '{key}'; copy it again")

    def read(self, name: str) -> Tensor:
        """Return one tensor, assembled from its blocks."""
        blocks = self._blocks[name]
        values = torch.empty(self.entries[name].shape, dtype=self.entries[name].dtype)
        for key, block in blocks:
            self._copy_chunks(block.of(values), self._saved[key])
        return values

    def _copy_chunks(self, values: Tensor, saved: SavedTensor) -> None:
        """Copy a tensor's chunks into ``values``."""
        for chunk in saved.chunks:
            content = self._open.read(chunk.file, chunk.start, chunk.length)
            try:
                part = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
                part = part.view(chunk.shape)
            except Exception as error:  # a pickle can fail in any way
                raise UserError(
                    f"{chunk.file} holds no tensor of shape {chunk.shape} where it should: {error}"
                ) from error
            del content
            target = values
            for axis, (offset, length) in enumerate(zip(chunk.offset, chunk.shape, strict=True)):
                target = target.narrow(axis, offset, length)
            target.copy_(part)


def _prefixes(source: CheckpointSource) -> dict[str, str]:
    """Return FusionTree's prefixes of names and Megatron's."""
    states = {state_prefix(state): f"optimizer.state.{state}.{MODEL}" for state in source.state_dtypes}
    return {MODEL: MODEL, **states}


def _key(name: str, block: BlockPlace) -> str:
    return name if block.name is None else f"{name}.{block.name}"
