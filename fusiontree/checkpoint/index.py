"""The index of a checkpoint: where each rectangle of each tensor is, and the SHA-256 of its bytes.

It says what ``.metadata`` and the hashes say, in a form of which a rank reads only what it needs: rows of fixed length
(:mod:`fusiontree.checkpoint.rows`) by tensor and offset, in pages of at most 64; then a list of the tensors, with the
bounds and the SHA-256 of each page; the manifest has the SHA-256 of that list. A rank reads the list, and of each of
its tensors the pages in which its rectangles can be.

    pages | list: length of the JSON in 8 bytes, JSON, one record per page
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from fusiontree.checkpoint.hashed_file import TableFile
from fusiontree.checkpoint.manifest import CheckpointDamage, FileEntry
from fusiontree.checkpoint.metadata import Chunk
from fusiontree.checkpoint.open_files import OpenFiles
from fusiontree.checkpoint.rows import Tensors, row_type

INDEX = "tensors.index"

_PAGE = 64
"""Rows of a page: fewer cost every rank a longer list, more a longer read per tensor."""


def _page_type(row: np.dtype) -> np.dtype:
    """Return the record type of the list's pages: the smallest rectangle around a page's rows, and their SHA-256."""
    number = row["offset"].base, row["offset"].shape
    return np.dtype([("begin", *number), ("end", *number), ("digest", "u1", (32,))])


class IndexFile(TableFile):
    """The index while it is written."""

    name = INDEX

    def __init__(self, folder: Path, tensors: Tensors, files: Sequence[str]) -> None:
        """Create the file; see :class:`TableFile`."""
        super().__init__(folder, tensors, files)
        self._row = row_type(shape for shape, _ in tensors.values())
        self._counts = np.zeros(len(tensors), np.int64)
        self._pages = [np.zeros(0, _page_type(self._row))]

    def add(self, rows: np.ndarray) -> None:
        """Write the next tensors' pages."""
        if not len(rows):
            return
        counts = np.bincount(rows["tensor"], minlength=len(self._counts))
        self._counts += counts
        ends = np.cumsum(counts)
        starts = np.concatenate([np.arange(end - count, end, _PAGE) for end, count in zip(ends, counts, strict=True)])
        pages = np.zeros(len(starts), _page_type(self._row))
        pages["begin"] = np.minimum.reduceat(rows["offset"], starts, axis=0)
        pages["end"] = np.maximum.reduceat(rows["offset"] + rows["shape"], starts, axis=0)
        raw = memoryview(np.ascontiguousarray(rows).view(np.uint8))  # type: ignore[arg-type]
        borders = [*(starts * self._row.itemsize).tolist(), len(raw)]
        digests = [hashlib.sha256(raw[a:b]).digest() for a, b in pairwise(borders)]
        pages["digest"] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
        self._out.write(raw)
        self._pages.append(pages)

    def finish(self) -> FileEntry:
        """Write the list, which is the last part of the manifest's entry."""
        tensors = [
            [name, list(shape), str(dtype).removeprefix("torch."), count]
            for (name, (shape, dtype)), count in zip(self._tensors.items(), self._counts.tolist(), strict=True)
        ]
        text = json.dumps({"files": list(self._files), "tensors": tensors}).encode()
        self._out.end_part()
        self._out.write(len(text).to_bytes(8, "little") + text)
        self._out.write(np.concatenate(self._pages).tobytes())
        return self._out.finish()


@dataclass(frozen=True)
class IndexedTensor:
    """One tensor of a checkpoint with an index; stands for :class:`~.metadata.SavedTensor`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: int
    """Number of rectangles."""
    number: int
    first_page: int
    first_row: int
    index: TensorIndex = field(repr=False, compare=False)

    def near(self, offset: tuple[int, ...], shape: tuple[int, ...]) -> Sequence[Chunk]:
        """Return the rectangles that overlap this one.

        Raises:
            CheckpointDamage: the index differs from its hash, or makes no sense.
        """
        return [chunk for rows in self.index.rows_near(self, offset, shape) for chunk in self.index.chunks(self, rows)]

    @property
    def chunks(self) -> Sequence[Chunk]:
        """All rectangles."""
        return self.near((0,) * len(self.shape), self.shape)


class TensorIndex:
    """The index of an open checkpoint, at ``path``."""

    def __init__(self, folder: Path, entries: dict[str, FileEntry], files: OpenFiles) -> None:
        """Read the list of the tensors.

        Args:
            folder: the checkpoint.
            entries: its manifest.
            files: its files.

        Raises:
            CheckpointDamage: the list differs from its hash.
        """
        self.path, self._open = folder / INDEX, files
        length, digest = entries[INDEX].parts[-1]
        self._end = entries[INDEX].size - length
        data = self._read(self._end, length, digest)
        try:
            size = int.from_bytes(data[:8], "little")
            content = json.loads(bytes(data[8 : 8 + size]))
            self.files: list[str] = content["files"]
            self._row = row_type(shape for _, shape, _, _ in content["tensors"])
            self._pages = np.frombuffer(data, _page_type(self._row), offset=8 + size)
            self._listed = [
                (str(name), tuple(shape), getattr(torch, dtype), count)
                for name, shape, dtype, count in content["tensors"]
            ]
            self._check_lengths()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointDamage(f"{self.path} cannot be read: {error}; the checkpoint is not usable") from error
        if unknown := [name for name in self.files if name not in entries]:
            raise CheckpointDamage(f"{self.path} names '{unknown[0]}', which is not in the checkpoint's manifest")
        self._last: tuple[int, np.ndarray] | None = None

    def _check_lengths(self) -> None:
        rows = sum(count for _, _, _, count in self._listed)
        pages = sum(-(-count // _PAGE) for _, _, _, count in self._listed)
        if pages != len(self._pages) or rows * self._row.itemsize != self._end:
            raise ValueError(f"it has {len(self._pages)} pages in {self._end} bytes, and lists {pages} of {rows} rows")

    @property
    def tensors(self) -> dict[str, IndexedTensor]:
        """The tensors, in saved order; made anew, so that the files close as soon as the last of them is gone."""
        found: dict[str, IndexedTensor] = {}
        page = row = 0
        for number, (name, shape, dtype, count) in enumerate(self._listed):
            found[name] = IndexedTensor(shape, dtype, count, number, page, row, self)
            page, row = page - (-count // _PAGE), row + count
        return found

    def _read(self, start: int, length: int, digest: str) -> bytearray:
        try:
            data = self._open.read(INDEX, start, length)
        except OSError as error:
            raise CheckpointDamage(f"{self.path} cannot be read: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise CheckpointDamage(f"{self.path} differs from its SHA-256 (bytes {start} to {start + length})")
        return data

    def _read_page(self, tensor: IndexedTensor, page: int) -> np.ndarray:
        """Return the rows of a page of a tensor."""
        begin = (page - tensor.first_page) * _PAGE
        count = min(_PAGE, tensor.pieces - begin)
        start = (tensor.first_row + begin) * self._row.itemsize
        digest = self._pages["digest"][page].tobytes().hex()
        rows = np.frombuffer(self._read(start, count * self._row.itemsize, digest), self._row)
        offset = rows["offset"].astype(np.int64)
        end = (offset + rows["shape"])[:, : len(tensor.shape)]
        sensible = (
            (rows["tensor"] == tensor.number).all()
            and (rows["file"] < len(self.files)).all()
            and (rows["start"] >= 0).all()
            and (rows["length"] >= 0).all()
            and (offset >= 0).all()
            and (rows["shape"] > 0).all()
            and (end <= np.array(tensor.shape, np.int64)).all()
        )
        if not sensible:
            raise CheckpointDamage(f"{self.path}: a rectangle in bytes {start} on is no part of its tensor")
        return rows

    def _page(self, tensor: IndexedTensor, page: int) -> np.ndarray:
        if self._last is None or self._last[0] != page:  # a rank's rectangles of a tensor are near each other
            self._last = page, self._read_page(tensor, page)
        return self._last[1]

    def rows_near(self, tensor: IndexedTensor, offset: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """Yield the rows of a tensor that overlap a rectangle, page by page; see :meth:`IndexedTensor.near`."""
        axes = len(offset)
        low = np.array(offset, np.int64)
        high = low + np.array(shape, np.int64)
        last = tensor.first_page + math.ceil(tensor.pieces / _PAGE)
        pages = self._pages[tensor.first_page : last]
        inside = ((pages["begin"][:, :axes] < high) & (pages["end"][:, :axes] > low)).all(axis=1)
        for page in np.flatnonzero(inside).tolist():
            rows = self._page(tensor, tensor.first_page + page)
            begin, end = rows["offset"][:, :axes], rows["offset"][:, :axes] + rows["shape"][:, :axes]
            yield rows[((begin < high) & (end > low)).all(axis=1)]

    def all_rows(self) -> np.ndarray:
        """Return all rows, each page compared with its hash.

        Raises:
            CheckpointDamage: the index differs from its hash, or makes no sense.
        """
        pages = [
            self._read_page(tensor, tensor.first_page + page)
            for tensor in self.tensors.values()
            for page in range(math.ceil(tensor.pieces / _PAGE))
        ]
        return np.concatenate([np.zeros(0, self._row), *pages])

    def chunks(self, tensor: IndexedTensor, rows: np.ndarray) -> Iterator[Chunk]:
        """Yield rows of a tensor as rectangles."""
        axes = len(tensor.shape)
        columns = (rows[name].tolist() for name in ("offset", "shape", "file", "start", "length"))
        for offset, shape, file, start, length, digest in zip(*columns, rows["digest"], strict=True):
            place = self.files[file], start, length
            yield Chunk(tuple(offset[:axes]), tuple(shape[:axes]), *place, digest.tobytes().hex())
