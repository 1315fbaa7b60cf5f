"""Reads tensors of a checkpoint in parallel; hashes bytes while reading, and reads each byte once.

A rank reads and verifies exactly the saved rectangles that overlap its shards, whatever layout saved them. Memory
besides the targets is the largest rectangle or a quarter of a gigabyte, whichever is more: several rectangles are
hashed at a time, one per core.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import zipfile
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusiontree.checkpoint.cover import first_overlap
from fusiontree.checkpoint.index import INDEX, IndexedTensor, TensorIndex
from fusiontree.checkpoint.manifest import (
    ByteCount,
    CheckpointDamage,
    FileEntry,
    Report,
    check_file,
    check_size,
    read_manifest,
)
from fusiontree.checkpoint.metadata import METADATA, Chunk, SavedTensor, read_metadata
from fusiontree.checkpoint.open_files import Buffers, OpenFiles
from fusiontree.checkpoint.save_plan import pieces_of
from fusiontree.utils.errors import UserError, nearest

_READ = 4 << 20
_IN_FLIGHT = 256 << 20


@dataclass
class _Job:
    """A saved rectangle to read, and the views that it fills."""

    name: str
    chunk: Chunk
    dtype: torch.dtype
    targets: list[tuple[Tensor, tuple[slice, ...]]]
    """Views of target tensors, and the part of the rectangle that fills each view."""


class CheckpointReader:
    """An open checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        """Read manifest and index, or metadata if there is no index.

        Raises:
            CheckpointDamage: one of them is damaged.
        """
        self.folder = folder
        self.files = read_manifest(folder)
        self._open = OpenFiles(folder)
        self.tensors: dict[str, SavedTensor | IndexedTensor] = {}
        if INDEX in self.files and not self.files[INDEX].whole:
            self.tensors |= TensorIndex(folder, self.files, self._open).tensors
        else:  # of a former version, or of another program
            self.check(METADATA)
            self.tensors |= read_metadata(folder)
        self._sized: set[str] = set()

    def check(self, name: str) -> None:
        """Compare one complete file with its recorded hash.

        Raises:
            CheckpointDamage: the hash differs, or the manifest does not list the file.
        """
        check_file(self.folder / name, self._entry(name))

    def check_small_files(self) -> None:
        """Compare every file without tensors with its recorded hash.

        Raises:
            CheckpointDamage: a hash differs.
        """
        for name, entry in self.files.items():
            if entry.whole and not name.endswith(".distcp"):
                self.check(name)

    def _entry(self, name: str) -> FileEntry:
        if name not in self.files:
            raise CheckpointDamage(f"{self.folder / name} is not in the checkpoint's manifest")
        return self.files[name]

    def _saved(self, name: str) -> SavedTensor | IndexedTensor:
        if name not in self.tensors:
            raise UserError(f"{self.folder} holds no tensor '{name}'{nearest(name, self.tensors)}")
        return self.tensors[name]

    def read(self, name: str) -> Tensor:
        """Return one full tensor on the CPU.

        Raises:
            UserError: there is no tensor of that name.
            CheckpointDamage: the tensor's bytes differ from their recorded hash.
        """
        saved = self._saved(name)
        tensor = torch.empty(saved.shape, dtype=saved.dtype)
        self.fill({name: tensor})
        return tensor

    def fill(
        self,
        tensors: dict[str, Tensor],
        *,
        in_flight: int = _IN_FLIGHT,
        report: Report | None = None,
    ) -> None:
        """Fill this rank's shards of ``tensors`` in place, casting to their dtypes.

        Args:
            tensors: plain tensors, DTensors or GlobalTensors, on any device.
            in_flight: maximum bytes of rectangles in memory at a time; a larger rectangle is read alone.
            report: called with the bytes done and the total bytes.

        Raises:
            UserError: a tensor is missing in the checkpoint or has another shape.
            CheckpointDamage: bytes of a tensor differ from their recorded hash.
        """
        jobs = self._jobs(tensors)
        whole = sorted({job.chunk.file for job in jobs if self._digest(job.chunk) is None})
        for job in jobs:
            end, size = job.chunk.start + job.chunk.length, self._entry(job.chunk.file).size
            if end > size:  # before memory of that length is asked for
                raise CheckpointDamage(
                    f"{self.folder / job.chunk.file} has {size} bytes, and '{job.name}' ends at byte {end} of it"
                )
        sizes = [job.chunk.length for job in jobs]
        count = ByteCount(sum(sizes) + sum(self._entry(name).size for name in whole), report)
        buffers = Buffers(max([in_flight, *sizes]))
        for name in {job.chunk.file for job in jobs} - self._sized:
            check_size(self.folder / name, self._entry(name))
            self._sized.add(name)
        threads = min(8, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(threads) as hashers:
            # Files of other programs have a single hash, so they are verified completely before their values are used.
            list(pool.map(lambda name: check_file(self.folder / name, self.files[name], count.add), whole))
            try:
                list(pool.map(lambda job: self._read_job(job, buffers, count, hashers), jobs))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _jobs(self, tensors: dict[str, Tensor]) -> list[_Job]:
        jobs: dict[tuple[str, int], _Job] = {}
        for name, tensor in tensors.items():
            saved = self._saved(name)
            if saved.shape != tuple(tensor.shape):
                raise UserError(
                    f"{self.folder}: '{name}' has shape {saved.shape}, the model wants {tuple(tensor.shape)}"
                )
            for offset, view in pieces_of(tensor):
                filled = 0
                used = []
                for chunk in saved.near(offset, tuple(view.shape)):
                    if overlap := _overlap(offset, tuple(view.shape), chunk):
                        there, here = overlap
                        job = jobs.setdefault((chunk.file, chunk.start), _Job(name, chunk, saved.dtype, []))
                        job.targets.append((view[there], here))
                        filled += view[there].numel()
                        used.append(chunk)
                if pair := first_overlap([(chunk.offset, chunk.shape) for chunk in used]):
                    places = " and ".join(f"{used[i].offset} of shape {used[i].shape}" for i in pair)
                    raise CheckpointDamage(f"{self.folder}: rectangles of '{name}' at {places} overlap")
                if filled < view.numel():
                    raise CheckpointDamage(f"{self.folder} holds only {filled} of {view.numel()} values of '{name}'")
        return [jobs[key] for key in sorted(jobs)]

    def _digest(self, chunk: Chunk) -> str | None:
        """Return the recorded SHA-256 of exactly this rectangle's bytes, or None if there is none."""
        return chunk.digest or self._entry(chunk.file).digest_at(chunk.start, chunk.length)

    @torch.no_grad()
    def _read_job(self, job: _Job, buffers: Buffers, count: ByteCount, hashers: Executor) -> None:
        chunk = job.chunk
        path = self.folder / chunk.file
        with buffers.of(chunk.length) as buffer:
            digest = self._digest(chunk)
            found = self._read_bytes(chunk, buffer.numpy().data, count.add, None if digest is None else hashers)
            if digest is not None and found != digest:
                raise CheckpointDamage(
                    f"{path} differs from the SHA-256 in its manifest at '{job.name}' "
                    f"(bytes {chunk.start} to {chunk.start + chunk.length})"
                )
            values = _tensor_in(buffer, job, path, ours=digest is not None)
            for view, part in job.targets:
                view.copy_(values[part])

    def _read_bytes(
        self, chunk: Chunk, buffer: memoryview, progress: Callable[[int], None], hashers: Executor | None
    ) -> str:
        """Fill ``buffer`` with a rectangle's bytes and return the SHA-256 of the bytes read.

        Hashing a part overlaps reading the next part, since only one large rectangle is in memory at a time.
        """
        path = self.folder / chunk.file
        digest = hashlib.sha256()
        done = 0
        hashing: Future[None] | None = None
        try:
            with self._open.lend(chunk.file) as file:
                while done < len(buffer):
                    size = os.preadv(file, [buffer[done : done + _READ]], chunk.start + done)
                    if not size:
                        raise CheckpointDamage(f"{path} ends at byte {chunk.start + done}, its manifest says otherwise")
                    if hashing is not None:
                        hashing.result()
                    if hashers is not None:
                        hashing = hashers.submit(digest.update, buffer[done : done + size])
                    done += size
                    progress(size)
        except OSError as error:
            raise CheckpointDamage(f"{path} cannot be read: {error.strerror}") from error
        if hashing is not None:
            hashing.result()
        return digest.hexdigest()


def _overlap(
    offset: tuple[int, ...], shape: tuple[int, ...], chunk: Chunk
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Return the overlap of a held and a saved rectangle as slices of the held and slices of the saved rectangle."""
    held, saved = [], []
    for at, size, chunk_at, chunk_size in zip(offset, shape, chunk.offset, chunk.shape, strict=True):
        begin, end = max(at, chunk_at), min(at + size, chunk_at + chunk_size)
        if begin >= end:
            return None
        held.append(slice(begin - at, end - at))
        saved.append(slice(begin - chunk_at, end - chunk_at))
    return tuple(held), tuple(saved)


def _tensor_in(buffer: Tensor, job: _Job, path: Path, *, ours: bool) -> Tensor:
    """Return the tensor, of the rectangle's shape, in bytes written by ``torch.save``, without executing a pickle.

    Rectangles written by this project are contiguous and are used without a copy. Others go through torch's restricted
    loader, which also supports strides.
    """
    shape, dtype = job.chunk.shape, job.dtype
    try:
        if not ours:
            found = torch.load(_View(buffer), map_location="cpu", weights_only=True)  # type: ignore[arg-type]
            assert tuple(found.shape) == shape and found.dtype == dtype
            return found
        with zipfile.ZipFile(_View(buffer)) as archive:
            record = next(info for info in archive.infolist() if info.filename.endswith("/data/0"))
        header = buffer[record.header_offset : record.header_offset + 30].tolist()
        names = header[26] + 256 * header[27] + header[28] + 256 * header[29]  # lengths of name and extra field
        start = record.header_offset + 30 + names
        size = math.prod(shape) * dtype.itemsize
        assert record.compress_type == zipfile.ZIP_STORED and record.file_size == size
        return buffer[start : start + size].view(dtype).view(shape)
    except Exception as error:
        raise CheckpointDamage(
            f"{path} holds no tensor of shape {shape} where '{job.name}' should be: {error}"
        ) from error


class _View(io.RawIOBase):
    """A file object over bytes, without a copy."""

    def __init__(self, buffer: Tensor) -> None:
        super().__init__()
        self._bytes: Any = buffer.numpy().data
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, len(self._bytes))[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, target: Any) -> int:
        view = memoryview(target).cast("B")
        part = self._bytes[self._at : self._at + len(view)]
        view[: len(part)] = part
        self._at += len(part)
        return len(part)
