"""Writes DCP's ``.metadata`` from rows, some tensors at a time.

The file is a pickle, in which torch expects three objects per rectangle: millions of them for many ranks. They are
never made here: what the pickle says of a rectangle has the same length for all rectangles of a tensor, so that it is
one template, filled with columns of numbers.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint.filesystem as filesystem
import torch.distributed.checkpoint.metadata as dcp

from fusiontree.checkpoint.hashed_file import TableFile
from fusiontree.checkpoint.manifest import FileEntry
from fusiontree.checkpoint.metadata import METADATA
from fusiontree.checkpoint.rows import Tensors, row_type

_SHARED = (torch.Size, dcp.ChunkStorageMetadata, dcp.MetadataIndex, filesystem._StorageInfo)
_SIZE, _CHUNK, _INDEX, _INFO, _TENSORS, _STORAGE = (pickle.BINGET + bytes([slot]) for slot in range(6))
"""Opcodes that push a shared class or dictionary."""
_FIRST_FILE = 6
_Part = bytes | np.ndarray


class MetadataFile(TableFile):
    """The file while it is written."""

    name = METADATA

    def __init__(self, folder: Path, tensors: Tensors, files: Sequence[str]) -> None:
        """Create the file; see :class:`TableFile`."""
        super().__init__(folder, tensors, files)
        self._entries = list(tensors.items())
        self._first_name = _FIRST_FILE + len(files)
        self._done = 0
        self._head = [
            pickle.PROTO + b"\x02",
            *(_keep(slot, _pickled(kind)) for slot, kind in enumerate(_SHARED)),
            *(_keep(slot, pickle.EMPTY_DICT) for slot in (4, 5)),
            *(_keep(_FIRST_FILE + number, _pickled(name)) for number, name in enumerate(files)),
        ]

    def add(self, rows: np.ndarray) -> None:
        """Write the next tensors, and those before them that have no rows."""
        if not len(rows):
            return
        numbers = range(self._done, int(rows["tensor"][-1]) + 1)
        for number, part in zip(numbers, np.split(rows, np.searchsorted(rows["tensor"], numbers[1:])), strict=True):
            self._add_tensor(number, part)
        self._done = numbers.stop

    def _begin(self) -> None:
        self._out.write(b"".join(self._head))
        self._head.clear()

    def _add_tensor(self, number: int, rows: np.ndarray) -> None:
        self._begin()
        name, (shape, dtype) = self._entries[number]
        slot = self._first_name + number
        offset = _size([rows["offset"][:, axis] for axis in range(len(shape))])
        size = _size([rows["shape"][:, axis] for axis in range(len(shape))])
        chunks = _woven(len(rows), [_CHUNK, *offset, *size, pickle.TUPLE2, pickle.REDUCE])
        state = [
            *(_pickled("properties"), _pickled(dcp.TensorProperties(dtype=dtype))),
            *(_pickled("size"), _pickled(torch.Size(shape))),
            *(_pickled("chunks"), pickle.EMPTY_LIST, pickle.MARK, chunks, pickle.APPENDS),
        ]
        key = _keep(slot, _pickled(name)) + _TENSORS + _get(slot)
        self._out.write(key + _new(dcp.TensorStorageMetadata, b"".join(state)) + pickle.SETITEM + pickle.POP)
        place = [*_integer(rows["start"]), *_integer(rows["length"])]
        file: list[_Part] = [pickle.LONG_BINGET, (rows["file"] + np.uint32(_FIRST_FILE)).astype("<u4")]
        index = [_INDEX, _get(slot), *offset, pickle.TUPLE2, pickle.REDUCE]
        info = [_INFO, *file, *place, pickle.TUPLE3, pickle.REDUCE]
        self._out.write(_STORAGE + pickle.MARK + _woven(len(rows), [*index, *info]) + pickle.SETITEMS + pickle.POP)

    def finish(self) -> FileEntry:
        """Write the tensors that are left, which have no rows, and the end."""
        self._begin()
        nothing = np.zeros(0, row_type(shape for _, (shape, _) in self._entries))
        for number in range(self._done, len(self._entries)):
            self._add_tensor(number, nothing)
        fields = {
            "state_dict_metadata": _TENSORS,
            "planner_data": _pickled({name: (name,) for name, _ in self._entries}),
            "storage_data": _STORAGE,
            "storage_meta": _pickled(dcp.StorageMeta()),
            "version": _pickled(filesystem.CURRENT_DCP_VERSION),
        }
        state = b"".join(_pickled(name) + value for name, value in fields.items())
        self._out.write(_new(dcp.Metadata, state) + pickle.STOP)
        return self._out.finish()


def _pickled(value: Any) -> bytes:
    """Return opcodes that push ``value`` and do not touch the memo."""
    out = io.BytesIO()
    pickler = pickle.Pickler(out, 2)
    pickler.fast = True
    pickler.dump(value)
    return out.getvalue()[2:-1]  # without the protocol's number and the end


def _new(kind: type, state: bytes) -> bytes:
    """Return opcodes that push an object of a data class with the fields that ``state`` pushes: names and values."""
    fields = pickle.EMPTY_DICT + pickle.MARK + state + pickle.SETITEMS
    return _pickled(kind) + pickle.EMPTY_TUPLE + pickle.NEWOBJ + fields + pickle.BUILD


def _keep(slot: int, value: bytes) -> bytes:
    """Return opcodes that put a value into the memo."""
    return value + pickle.LONG_BINPUT + struct.pack("<I", slot) + pickle.POP


def _get(slot: int) -> bytes:
    return pickle.LONG_BINGET + struct.pack("<I", slot)


def _integer(column: np.ndarray) -> list[_Part]:
    """Return the parts that push a number: 32 bits with sign for columns of 32 bits, which have values below 2^31."""
    if column.dtype.itemsize == 4:
        return [pickle.BININT, column.astype("<i4")]
    return [pickle.LONG1 + b"\x08", column.astype("<i8")]


def _size(columns: Sequence[np.ndarray]) -> list[_Part]:
    """Return the parts that push a ``torch.Size``."""
    numbers = [part for column in columns for part in _integer(column)]
    return [_SIZE, pickle.MARK, *numbers, pickle.TUPLE, pickle.TUPLE1, pickle.REDUCE]


def _woven(count: int, parts: Sequence[_Part]) -> bytes:
    """Return ``parts`` after each other, ``count`` times: constants, and the next value of each column."""
    widths = [len(part) if isinstance(part, bytes) else part.dtype.itemsize for part in parts]
    out = np.empty((count, sum(widths)), np.uint8)
    at = 0
    for part, width in zip(parts, widths, strict=True):
        raw = part if isinstance(part, bytes) else np.ascontiguousarray(part)
        values = np.frombuffer(raw, np.uint8)
        out[:, at : at + width] = values if isinstance(part, bytes) else values.reshape(count, width)
        at += width
    return out.tobytes()
