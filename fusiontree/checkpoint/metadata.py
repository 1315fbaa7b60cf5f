"""DCP's ``.metadata``: the tensors of a checkpoint, and the file ranges of their rectangles.

The file is a pickle, and unpickling runs the functions that it names; ``torch.distributed.checkpoint`` does so without
restriction. This module only creates the few data classes that belong in it and rejects anything else before it runs.
"""

from __future__ import annotations

import collections
import io
import pathlib
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.filesystem as filesystem
import torch.distributed.checkpoint.metadata as dcp
import torch.distributed.checkpoint.planner as planner

from fusiontree.checkpoint.manifest import CheckpointDamage

METADATA = ".metadata"

_CLASSES: dict[tuple[str, str], Any] = {
    (dcp.__name__, name): getattr(dcp, name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
}
_CLASSES |= {
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): lambda name: torch.strided,  # the only layout that is saved
    ("collections", "OrderedDict"): collections.OrderedDict,
}
# megatron-core also writes its save plan, which consists of data classes.
_CLASSES |= {
    (planner.__name__, name): getattr(planner, name)
    for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
}
_CLASSES |= {
    (module, name): pathlib.PurePosixPath  # original path of the checkpoint; never opened
    for module in ("pathlib", "pathlib._local")
    for name in ("PosixPath", "PurePosixPath", "Path")
}


class RestrictedUnpickler(pickle.Unpickler):
    """Creates only objects that :attr:`allowed` names, and torch's dtypes; imports nothing.

    :mod:`fusiontree.convert.safe_unpickle` derives the unpickler of other libraries' files.
    """

    allowed: Mapping[tuple[str, str], Any] = _CLASSES
    """Class or function per (module, name) in the file."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what the file names as ``module.name``."""
        if (module, name) in self.allowed:
            return self.allowed[module, name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        return self.other(module, name)

    def other(self, module: str, name: str) -> Any:
        """Raise UnpicklingError; subclasses may return a substitute."""
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not allowed and was not run")


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor, and the file range of its bytes."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    length: int
    digest: str | None = None
    """SHA-256 of the bytes, if the index of the checkpoint records it."""


@dataclass(frozen=True)
class SavedTensor:
    """One tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]

    def near(self, offset: tuple[int, ...], shape: tuple[int, ...]) -> Sequence[Chunk]:
        """Return rectangles, among them all that overlap this one."""
        return self.chunks

    @property
    def pieces(self) -> int:
        """Number of rectangles."""
        return len(self.chunks)


def read_metadata(folder: Path) -> dict[str, SavedTensor]:
    """Return the tensors of a DCP folder, in saved order, without executing anything in it.

    Raises:
        CheckpointDamage: the file is missing, is not DCP metadata, or names a function that must not run.
    """
    path = folder / METADATA
    try:
        metadata = RestrictedUnpickler(io.BytesIO(path.read_bytes())).load()
        return {
            name: _tensor(name, entry, metadata.storage_data)
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, dcp.TensorStorageMetadata)
        }
    except Exception as error:  # a pickle can fail in any way
        raise CheckpointDamage(f"{path} cannot be read: {error}; the checkpoint is not usable") from error


def _tensor(name: str, entry: dcp.TensorStorageMetadata, storage: dict[Any, Any]) -> SavedTensor:
    chunks = []
    for chunk in entry.chunks:
        if 0 not in chunk.sizes:
            place = storage[dcp.MetadataIndex(name, chunk.offsets)]
            _check_place(chunk.offsets, chunk.sizes, entry.size, place)
            if "/" in place.relative_path or place.relative_path.startswith(".."):
                raise ValueError(f"'{place.relative_path}' lies outside the checkpoint")
            chunks.append(
                Chunk(tuple(chunk.offsets), tuple(chunk.sizes), place.relative_path, place.offset, place.length)
            )
    return SavedTensor(tuple(entry.size), entry.properties.dtype, tuple(chunks))


def _check_place(offsets: Any, sizes: Any, shape: Any, place: Any) -> None:
    """Raise ValueError if a rectangle does not lie in its tensor, or its file range is none."""
    numbers = [*offsets, *sizes, *shape, place.offset, place.length]
    inside = len(offsets) == len(sizes) == len(shape) and all(type(n) is int and n >= 0 for n in numbers)
    if not inside or any(at + size > end for at, size, end in zip(offsets, sizes, shape, strict=True)):
        raise ValueError(
            f"a rectangle at {tuple(offsets)} of shape {tuple(sizes)}, bytes {place.offset} to "
            f"{place.offset + place.length}, is no part of a tensor of shape {tuple(shape)}"
        )
