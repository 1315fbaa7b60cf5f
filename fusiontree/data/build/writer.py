"""Writes data shards: deterministic tar members and an index, renamed when both are complete."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from fusiontree.data.format import ShardInfo
from fusiontree.data.sources.index import index_bytes, write_index
from fusiontree.utils.files import fsync_directory

_BLOCK = 512


def shard_name(number: int) -> str:
    """Return the file name of a dataset's shard."""
    return f"shard-{number:06d}.tar"


_EMPTY_HEADER = tarfile.TarInfo("").tobuf(format=tarfile.USTAR_FORMAT)
_EMPTY_SUM = int(_EMPTY_HEADER[148:154], 8)


def _tar_header(name: str, size: int) -> bytes:
    """Return a member's header, equal to tarfile's but ten times as fast."""
    name_bytes, size_bytes = name.encode("ascii"), b"%011o" % size
    assert len(name_bytes) < 100 and len(size_bytes) == 11
    total = _EMPTY_SUM + sum(name_bytes) + sum(size_bytes) - 11 * ord("0")
    header = bytearray(_EMPTY_HEADER)
    header[: len(name_bytes)] = name_bytes
    header[124:135] = size_bytes
    header[148:154] = b"%06o" % total
    return bytes(header)


class ShardWriter:
    """Writes one shard. The same documents give the same bytes on every machine."""

    def __init__(self, folder: Path, name: str, first_document: int, dtype: np.dtype) -> None:
        """Open a temporary file in ``folder``; :meth:`close` renames it to its final name."""
        self.path = folder / name
        self._partial = folder / f".{name}.tmp"
        self._file = self._partial.open("wb")
        self._first, self._dtype = first_document, dtype
        self._offsets: list[int] = []
        self._ends: list[int] = []
        self._hashes: list[bytes] = []
        self._digest = hashlib.sha256()
        self._npy_headers: dict[int, bytes] = {}

    @property
    def tokens(self) -> int:
        """Number of tokens written so far."""
        return self._ends[-1] if self._ends else 0

    def add(self, tokens: np.ndarray, meta: dict[str, Any]) -> None:
        """Append a document: its tokens (end-of-document token included) and its metadata."""
        key = f"{self._first + len(self._offsets):09d}"
        data = tokens.astype(self._dtype, copy=False).tobytes()
        header = self._npy_header(len(tokens))
        self._offsets.append(self._file.tell() + _BLOCK + len(header))
        self._ends.append(self.tokens + len(tokens))
        self._hashes.append(hashlib.sha256(data).digest())
        self._member(f"{key}.npy", header + data)
        self._member(f"{key}.json", json.dumps(meta, ensure_ascii=False, sort_keys=True).encode())

    def _npy_header(self, count: int) -> bytes:
        if count not in self._npy_headers:
            stream = io.BytesIO()
            np.lib.format.write_array_header_1_0(
                stream, {"descr": self._dtype.str, "fortran_order": False, "shape": (count,)}
            )
            self._npy_headers[count] = stream.getvalue()
        return self._npy_headers[count]

    def _member(self, name: str, content: bytes) -> None:
        self._write(b"".join((_tar_header(name, len(content)), content, bytes(-len(content) % _BLOCK))))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)

    def close(self) -> ShardInfo:
        """Finish tar and index, sync and rename both to their final names, and return the shard's description."""
        self._write(bytes(2 * _BLOCK))
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self._file.close()
        content = index_bytes(
            self._offsets,
            self._ends,
            self._hashes,
            tar_bytes=size,
            first=self._first,
            item_bytes=self._dtype.itemsize,
        )
        index_hash = write_index(self.path.with_suffix(".index"), content)
        os.replace(self._partial, self.path)
        fsync_directory(self.path.parent)
        return ShardInfo(self.path.name, len(self._offsets), self.tokens, size, index_hash, self._digest.hexdigest())
