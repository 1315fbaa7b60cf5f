"""Safetensors files, written and read one tensor at a time; a checkpoint format of a single such file.

A file is eight bytes with the header's length, a JSON header ``{name: {dtype, shape, data_offsets}}`` and the values.
The library's own ``save_file`` needs all tensors of a file in memory at once.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusiontree.checkpoint.open_files import OpenFiles
from fusiontree.convert.reader import MODEL, CheckpointSource, Entry, Stream, checked
from fusiontree.utils.errors import UserError

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_LONGEST_HEADER = 100 << 20
_MODEL_KEY = "fusiontree_model"  # entry of the metadata with the model's configuration


def write_safetensors(
    path: Path, entries: dict[str, Entry], read: Callable[[str], Tensor], metadata: dict[str, str]
) -> None:
    """Write a new file, tensor by tensor in the order of ``entries``, and sync it.

    Args:
        path: of the file.
        entries: shape and type of each tensor.
        read: returns the tensor of a name.
        metadata: free text for the header.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, entry in entries.items():
        end = offset + entry.nbytes
        header[name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # values begin aligned
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, entry in entries.items():
            tensor = read(name).contiguous()
            assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype), name
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            del tensor  # before the next tensor is read
        file.flush()
        os.fsync(file.fileno())


class SafetensorsFile:
    """A file open for reading; nothing in it is executed."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            UserError: the file is truncated, is not a safetensors file, or has tensors of an unknown type.
        """
        self.path = path
        self._open = OpenFiles(path.parent)
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else size + 1
            if length > min(size - 8, _LONGEST_HEADER):
                raise UserError(f"{path} is no whole safetensors file; copy it again")
            try:
                header = json.loads(file.read(length), object_pairs_hook=_unique, parse_constant=_refused)
                metadata = header.pop("__metadata__", None)
                self.metadata: dict[str, str] = {} if metadata is None else metadata
                if not all(isinstance(value, str) for value in self.metadata.values()):
                    raise TypeError("__metadata__ is no mapping of texts")
                kinds = {name: str(e["dtype"]) for name, e in header.items()}
                ranges = {name: _counts(e["data_offsets"]) for name, e in header.items()}
                shapes = {name: _counts(e["shape"]) for name, e in header.items()}
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(f"{path} has a header that cannot be read ({error!r}); copy it again") from error
        for name, kind in kinds.items():
            if kind not in _DTYPES:
                raise UserError(f"{path}: '{name}' is of type {kind}, which is not read here; save it in BF16 or F32")
        self.entries = {name: Entry(shapes[name], _DTYPES[kind]) for name, kind in kinds.items()}
        self._starts: dict[str, int] = {}
        before, last = 0, ""
        for name, place in sorted(ranges.items(), key=lambda item: item[1]):
            if len(place) != 2 or place[1] - place[0] != self.entries[name].nbytes or 8 + length + place[1] > size:
                raise UserError(f"{path}: the values of '{name}' are not where its header says; copy the file again")
            if place[0] < before:
                raise UserError(f"{path}: the values of '{last}' and '{name}' overlap; copy the file again")
            if place[0] > before:
                raise UserError(f"{path}: no tensor has the bytes before the values of '{name}'; copy the file again")
            self._starts[name] = 8 + length + place[0]
            before, last = place[1], name
        if 8 + length + before != size:
            raise UserError(f"{path}: no tensor has the bytes at the end of the file; copy the file again")

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        entry = self.entries[name]
        if not math.prod(entry.shape):
            return torch.empty(entry.shape, dtype=entry.dtype)
        content = self._open.read(self.path.name, self._starts[name], entry.nbytes)
        if len(content) != entry.nbytes:
            raise UserError(f"{self.path} ends inside '{name}'; copy it again")
        values = torch.frombuffer(content, dtype=torch.uint8)
        return values.view(entry.dtype).reshape(entry.shape)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        ValueError: a name is given twice.
    """
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name is given twice")
    return values


def _refused(word: str) -> Any:
    """Refuse ``NaN`` and infinities, which are no JSON."""
    raise ValueError(f"{word} is no JSON")


def _counts(values: Any) -> tuple[int, ...]:
    """Return sizes or offsets.

    Raises:
        TypeError: they are no list of numbers of bytes or elements.
    """
    if not isinstance(values, list) or any(type(value) is not int or value < 0 for value in values):
        raise TypeError(f"{values!r} are no sizes")
    return tuple(values)


class WeightFile(CheckpointSource):
    """One file with the weights under FusionTree's names, and the model's configuration in the header."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            UserError: the file is damaged, or was not written by :func:`write_weights`.
        """
        self._file = SafetensorsFile(path)
        if _MODEL_KEY not in self._file.metadata:
            raise UserError(
                f"{path} does not say which model it holds; to start from another model's weights give --map FILE and "
                f"--config FILE"
            )
        try:
            self.config = {"model": json.loads(self._file.metadata[_MODEL_KEY])}
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} describes its model by text that is no JSON ({error}); copy it again") from error
        self.files = []
        self.entries = {MODEL + name: entry for name, entry in self._file.entries.items()}
        self.entries = checked(self.entries, self.model_config, str(path))

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self._file.read(name.removeprefix(MODEL))


def write_weights(path: Path, stream: Stream) -> None:
    """Write the file of :class:`WeightFile`; leaves out moments and tokenizer."""
    names = [name for name in stream.source.entries if name.startswith(MODEL)]
    entries = {name.removeprefix(MODEL): stream.entry(name) for name in names}
    metadata = {"format": "pt", _MODEL_KEY: json.dumps(stream.source.config["model"])}
    write_safetensors(path, entries, lambda name: stream.read(MODEL + name), metadata)
