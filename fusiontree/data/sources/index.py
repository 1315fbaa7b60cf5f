"""The memory-mapped index of a data shard, and reads of tokens by offset with verified hashes.

Layout, little endian: a 64-byte header (see ``_HEADER``), then three arrays over the shard's documents:
data_offset int64 (of the first token in the tar), token_end int64 (running total of tokens), sha256 32 bytes (of the
document's token bytes). Rows are found by binary search in token_end; only the needed parts are read.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fusiontree.data.format import ShardDamage, ShardInfo
from fusiontree.data.sources.base import TokenSpan
from fusiontree.utils.files import atomic_write
from fusiontree.utils.hashing import sha256_file

MAGIC = b"FTINDEX1"
# magic, version, header bytes, documents, tokens, tar bytes, number of the first document, bytes per token
_HEADER = struct.Struct("<8sIIQQQQB")
_HEADER_BYTES = 64
_CHUNK = 1 << 22
"""Bytes per read when hashing, so that hashing does not load a long document into memory at once."""
_GAP = 1 << 13
"""Gaps between documents up to this many bytes are read and discarded, which is faster than a separate read."""


def index_size(documents: int) -> int:
    """Return the size in bytes of an index of ``documents`` documents."""
    return _HEADER_BYTES + documents * (8 + 8 + 32)


def index_bytes(
    offsets: list[int], token_ends: list[int], hashes: list[bytes], *, tar_bytes: int, first: int, item_bytes: int
) -> bytes:
    """Return the content of an index file."""
    tokens = token_ends[-1] if token_ends else 0
    header = _HEADER.pack(MAGIC, 1, _HEADER_BYTES, len(offsets), tokens, tar_bytes, first, item_bytes)
    arrays = np.asarray(offsets, "<i8").tobytes() + np.asarray(token_ends, "<i8").tobytes() + b"".join(hashes)
    return header.ljust(_HEADER_BYTES, b"\0") + arrays


def write_index(path: Path, content: bytes) -> str:
    """Write an index file and return its SHA-256."""
    with atomic_write(path, "wb") as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()


class Shard:
    """One shard opened for reading by token number. Reads may come from several threads at once."""

    def __init__(
        self, tar: Path, index: Path, info: ShardInfo, *, name: str | None = None, checked: bool = False
    ) -> None:
        """Map the index and open the tar.

        Args:
            tar: the tar file.
            index: its index.
            info: the shard's entry in dataset.json.
            name: name in error messages; None means the path of the tar.
            checked: True if the hash of this index file was already verified.

        Raises:
            ShardDamage: a file is missing or has another size, or the index differs from its recorded hash.
        """
        self.tar, self.info, self.name = tar, info, name or str(tar)
        self._descriptor = -1
        try:
            index_hash = info.index_sha256 if checked else sha256_file(index)
            with index.open("rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            size = tar.stat().st_size
        except (OSError, ValueError) as error:
            raise ShardDamage(self.name, None, f"cannot be opened: {error}") from error
        if index_hash != info.index_sha256 or len(content) != index_size(info.documents):
            raise ShardDamage(name or index, None, "has an index that differs from the hash in dataset.json")
        fields = _HEADER.unpack_from(content)
        magic, version, begin, documents, tokens, tar_bytes, self.first_document, self.item_bytes = fields
        if magic != MAGIC or version != 1:
            raise ShardDamage(name or index, None, f"has an index of version {version}, and this program reads 1")
        if (documents, tokens, tar_bytes) != (info.documents, info.tokens, info.bytes):
            raise ShardDamage(name or index, None, "has an index of another shard: its totals are not dataset.json's")
        if size != tar_bytes:
            raise ShardDamage(self.name, None, f"has {size} bytes, its index says {tar_bytes}: truncated or replaced")
        self.dtype = np.dtype(f"<u{self.item_bytes}")
        self._offsets = np.frombuffer(content, "<i8", documents, begin)
        self._ends = np.frombuffer(content, "<i8", documents, begin + 8 * documents)
        self._hashes = np.frombuffer(content, np.uint8, 32 * documents, begin + 16 * documents).reshape(-1, 32)
        self._verified = np.zeros(documents, bool)
        try:
            self._descriptor = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardDamage(self.name, None, f"cannot be opened: {error}") from error

    def close(self) -> None:
        """Close the tar file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    __del__ = close

    def is_removed(self) -> bool:
        """Return whether the tar has been deleted since it was opened."""
        return os.fstat(self._descriptor).st_nlink == 0

    def key(self, document: int) -> str:
        """Return the member key of the shard's ``document``."""
        return f"{self.first_document + document:09d}"

    def bounds(self, document: int) -> tuple[int, int]:
        """Return ``(start, stop)`` of the tokens of ``document`` in the shard."""
        return (int(self._ends[document - 1]) if document else 0), int(self._ends[document])

    def document_at(self, token: int) -> int:
        """Return the document that contains token number ``token`` of the shard."""
        return int(self._ends.searchsorted(token, "right"))

    def read(self, begin: int, end: int) -> TokenSpan:
        """Read tokens [begin, end) of the shard; the range must be non-empty and within the shard.

        Every returned token is verified: documents inside the range are hashed as they are read; a document that
        reaches beyond the range is hashed in full when it is first read.

        Raises:
            ShardDamage: a document's bytes cannot be read or differ from their hash.
        """
        first, last = self.document_at(begin), self.document_at(end - 1)
        ends = self._ends[first : last + 1].tolist()
        offsets = self._offsets[first : last + 1].tolist()
        starts = [int(self._ends[first - 1]) if first else 0, *ends[:-1]]
        hashes = self._hashes[first : last + 1].tobytes()
        tokens = np.empty(end - begin if first < last else 0, self.dtype)
        size = self.item_bytes
        for group in _near_groups(offsets, starts, ends, size):
            low = max(begin - starts[group.start], 0)
            high = min(end, ends[group.stop - 1]) - starts[group.stop - 1]
            base = offsets[group.start] + low * size
            data = memoryview(self._pread(first + group.start, base, offsets[group.stop - 1] + high * size - base))
            for i in group:
                low, high = max(begin, starts[i]), min(end, ends[i])
                where = offsets[i] + (low - starts[i]) * size - base
                piece = data[where : where + (high - low) * size]
                if high - low < ends[i] - starts[i]:
                    self._verify(first + i)
                elif hashlib.sha256(piece).digest() != hashes[32 * i : 32 * i + 32]:
                    raise self._differs(first + i)
                if first == last:
                    tokens = np.frombuffer(piece, self.dtype)
                else:
                    tokens[low - begin : high - begin] = np.frombuffer(piece, self.dtype)
        inside = np.asarray(starts[0 if starts[0] == begin else 1 :], np.int64) - begin
        return TokenSpan(tokens, inside)

    def read_document(self, document: int) -> np.ndarray:
        """Read one complete document; see :meth:`read`."""
        first, last = self.bounds(document)
        data = self._pread(document, int(self._offsets[document]), (last - first) * self.item_bytes)
        if hashlib.sha256(data).digest() != self._hashes[document].tobytes():
            raise self._differs(document)
        return np.frombuffer(data, self.dtype)

    def damages(self) -> Iterator[ShardDamage]:
        """Read every document and yield the damage of each that is damaged."""
        for document in range(self.info.documents):
            try:
                self.read_document(document)
            except ShardDamage as damage:
                yield damage

    def _verify(self, document: int) -> None:
        """Compare a document with its hash, unless it was already verified."""
        if self._verified[document]:
            return
        first, last = self.bounds(document)
        offset = int(self._offsets[document])
        state, end = hashlib.sha256(), offset + (last - first) * self.item_bytes
        while offset < end:
            state.update(self._pread(document, offset, min(_CHUNK, end - offset)))
            offset += _CHUNK
        if state.digest() != self._hashes[document].tobytes():
            raise self._differs(document)
        self._verified[document] = True

    def _differs(self, document: int) -> ShardDamage:
        return ShardDamage(self.name, self.key(document), "its tokens differ from their recorded hash")

    def _pread(self, document: int, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise ShardDamage(self.name, self.key(document), f"cannot be read: {error}") from error
        if len(data) != size:
            raise ShardDamage(self.name, self.key(document), f"ends {size - len(data)} bytes early: truncated")
        return data


def open_shard(folder: Path, info: ShardInfo) -> Shard:
    """Open a shard of a local dataset folder; see :class:`Shard`."""
    tar = folder / info.name
    return Shard(tar, tar.with_suffix(".index"), info)


def _near_groups(offsets: list[int], starts: list[int], ends: list[int], size: int) -> list[range]:
    """Split documents into groups that are close together in the file, so that one read fetches each group."""
    groups, begin = [], 0
    for i in range(1, len(offsets)):
        gap = offsets[i] - (offsets[i - 1] + (ends[i - 1] - starts[i - 1]) * size)
        if not 0 <= gap <= _GAP:
            groups.append(range(begin, i))
            begin = i
    groups.append(range(begin, len(offsets)))
    return groups
