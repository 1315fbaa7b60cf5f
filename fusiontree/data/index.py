"""The index beside a shard, memory-mapped, and reading tokens by offset with their hashes checked.

Layout, little endian: a 64-byte header (see ``_HEADER``), then three arrays over the shard's documents:
data_offset int64 (of the first token in the tar), token_end int64 (running total of tokens), sha256 32 bytes (of the
document's token bytes). Rows are found by binary search in token_end; nothing is read but what is needed.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusiontree.data.format import ShardDamage, ShardInfo
from fusiontree.utils.files import atomic_write

MAGIC = b"FTINDEX1"
# magic, version, header bytes, documents, tokens, tar bytes, number of the first document, bytes a token
_HEADER = struct.Struct("<8sIIQQQQB")
_HEADER_BYTES = 64
_VERIFIED_DOCUMENTS = 1 << 16


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


@dataclass(frozen=True)
class TokenSpan:
    """Tokens of a shard and where their documents start."""

    tokens: np.ndarray
    positions: np.ndarray
    """Position of each token inside its document, int64."""


class Shard:
    """One shard opened for reading by token number."""

    def __init__(self, tar: Path, index: Path, info: ShardInfo) -> None:
        """Map the index and open the tar.

        Raises:
            ShardDamage: a file is missing or has another size, or the index differs from its recorded hash.
        """
        self.tar, self.info = tar, info
        self._descriptor = -1
        try:
            content: np.ndarray = np.memmap(index, dtype=np.uint8, mode="r")
            size = tar.stat().st_size
        except (OSError, ValueError) as error:
            raise ShardDamage(tar, None, f"cannot be opened: {error}") from error
        if hashlib.sha256(content.data).hexdigest() != info.index_sha256:
            raise ShardDamage(index, None, "differs from the hash in dataset.json")
        fields = _HEADER.unpack_from(content[: _HEADER.size].tobytes())
        _, _, begin, documents, _, tar_bytes, self.first_document, self.item_bytes = fields
        if size != tar_bytes:
            raise ShardDamage(tar, None, f"has {size} bytes, its index says {tar_bytes}: truncated or replaced")
        self.dtype = np.dtype(f"<u{self.item_bytes}")
        self._offsets = content[begin : begin + 8 * documents].view("<i8")
        self._ends = content[begin + 8 * documents : begin + 16 * documents].view("<i8")
        self._hashes = content[begin + 16 * documents :].reshape(documents, 32)
        self._verified: OrderedDict[int, None] = OrderedDict()
        self._descriptor = os.open(tar, os.O_RDONLY)

    def close(self) -> None:
        """Close the tar file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    __del__ = close

    def key(self, document: int) -> str:
        """Return the member key of the shard's ``document``."""
        return f"{self.first_document + document:09d}"

    def bounds(self, document: int) -> tuple[int, int]:
        """Return the first token of ``document`` in the shard and the one after its last."""
        return (int(self._ends[document - 1]) if document else 0), int(self._ends[document])

    def document_at(self, token: int) -> int:
        """Return the document that token number ``token`` of the shard belongs to."""
        return int(np.searchsorted(self._ends, token, side="right"))

    def read(self, begin: int, end: int) -> TokenSpan:
        """Read tokens [begin, end) of the shard.

        Raises:
            ShardDamage: a document's bytes cannot be read or differ from their hash.
        """
        pieces, positions = [], []
        document = self.document_at(begin)
        while begin < end:
            first, last = self.bounds(document)
            stop = min(end, last)
            pieces.append(self._read_part(document, begin - first, stop - first))
            positions.append(np.arange(begin - first, stop - first))
            begin, document = stop, document + 1
        return TokenSpan(np.concatenate(pieces), np.concatenate(positions))

    def read_document(self, document: int) -> np.ndarray:
        """Read one document whole; see :meth:`read`."""
        first, last = self.bounds(document)
        return self._read_part(document, 0, last - first)

    def _read_part(self, document: int, begin: int, end: int) -> np.ndarray:
        first, last = self.bounds(document)
        offset = int(self._offsets[document])
        if document not in self._verified or (begin, end) == (0, last - first):
            # The hash covers the whole document, so a part of it is checked once with the whole.
            data = self._pread(document, offset, (last - first) * self.item_bytes)
            if hashlib.sha256(data).digest() != self._hashes[document].tobytes():
                raise ShardDamage(self.tar, self.key(document), "its tokens differ from their recorded hash")
            self._verified[document] = None
            if len(self._verified) > _VERIFIED_DOCUMENTS:
                self._verified.popitem(last=False)
            return np.frombuffer(data, self.dtype)[begin:end]
        data = self._pread(document, offset + begin * self.item_bytes, (end - begin) * self.item_bytes)
        return np.frombuffer(data, self.dtype)

    def _pread(self, document: int, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise ShardDamage(self.tar, self.key(document), f"cannot be read: {error}") from error
        if len(data) != size:
            raise ShardDamage(self.tar, self.key(document), f"ends {size - len(data)} bytes early: truncated")
        return data
