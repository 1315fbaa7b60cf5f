"""Writes the files of a checkpoint, in DCP's format, and hashes them while writing.

Each rank writes its tensor files, and rank 0 the small files; :mod:`.tables` writes those that describe the tensors.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fusiontree.checkpoint.folders import STATE
from fusiontree.checkpoint.manifest import FileEntry, file_entries, write_manifest
from fusiontree.checkpoint.metadata import Chunk
from fusiontree.checkpoint.save_plan import Rectangle
from fusiontree.utils.files import atomic_write, write_json

_FILE_BYTES = 256 << 20
_MOST_FILES = 4


@dataclass(frozen=True)
class Written:
    """One written file and its content."""

    name: str
    size: int
    chunks: list[tuple[str, Chunk]]


def write_files(folder: Path, rank: int, pieces: dict[Rectangle, Tensor]) -> list[Written]:
    """Write rectangles into this rank's files in ``folder``, several files at a time, and sync them.

    Raises:
        OSError: the disk is full, the folder is gone …
    """
    bins = _share_out(pieces)
    jobs = [(f"__{rank}_{number}.distcp", part) for number, part in enumerate(bins)]
    with ThreadPoolExecutor(max(1, len(jobs)), thread_name_prefix="checkpoint-file") as pool:
        return list(pool.map(lambda job: write_file(folder, *job), jobs))


def _share_out(pieces: dict[Rectangle, Tensor]) -> list[list[tuple[Rectangle, Tensor]]]:
    total = sum(piece.nbytes for piece in pieces.values())
    bins: list[list[tuple[Rectangle, Tensor]]] = [[] for _ in range(max(1, min(_MOST_FILES, total // _FILE_BYTES)))]
    load = [0] * len(bins)
    for rectangle, piece in sorted(pieces.items(), key=lambda item: -item[1].nbytes):
        least = load.index(min(load))
        bins[least].append((rectangle, piece))
        load[least] += piece.nbytes
    return [part for part in bins if part]


def write_file(folder: Path, name: str, pieces: Iterable[tuple[Rectangle, Tensor]]) -> Written:
    """Write one new file, rectangle by rectangle in the order of ``pieces``, and sync it.

    Raises:
        OSError: the disk is full, the folder is gone …
    """
    chunks: list[tuple[str, Chunk]] = []
    start = 0
    path = folder / name
    try:
        with path.open("xb") as file:
            for (tensor_name, offset, shape), live in pieces:
                stream = _HashingStream(file)
                try:
                    torch.save(_own_storage(live), stream)  # type: ignore[arg-type]
                except RuntimeError:
                    if stream.error:
                        raise stream.error from None
                    raise
                chunks.append((tensor_name, Chunk(offset, shape, name, start, stream.size, stream.hexdigest())))
                start += stream.size
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return Written(name, start, chunks)


def write_small_files(
    folder: Path, state: dict[str, Any], extra_files: Iterable[Path], files: Mapping[str, FileEntry]
) -> None:
    """Write ``state`` and copies of ``extra_files``, then the manifest, which declares the folder complete.

    Args:
        folder: of the checkpoint.
        state: small values.
        extra_files: small files to copy.
        files: the result of :func:`~.tables.write_tables`.

    Raises:
        OSError: the disk is full …
    """
    write_json(folder / STATE, state)
    small = [folder / STATE]
    for extra in extra_files:
        with atomic_write(folder / extra.name, "wb") as out:
            out.write(extra.read_bytes())
        small.append(folder / extra.name)
    entries = {name: entry.to_dict() for name, entry in files.items()}
    write_manifest(folder, file_entries(small, folder) | entries)


def _own_storage(live: Tensor) -> Tensor:
    """Return the values on the CPU, contiguous, in a separate storage, as torch.save writes complete storages."""
    values = live.detach().cpu()
    if values.is_contiguous() and values.untyped_storage().nbytes() == values.nbytes:
        return values
    return values.contiguous() if not values.is_contiguous() else values.clone()


class _HashingStream:
    """Output stream for torch.save that hashes the bytes it writes.

    If a write fails, torch may raise another error that hides the cause; ``error`` keeps the cause.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self._digest.update(data)
        size = len(data)
        self.size += size
        return size

    def flush(self) -> None:
        pass

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
