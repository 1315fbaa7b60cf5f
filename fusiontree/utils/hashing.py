"""Hashes that are the same on every machine, process and layout."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path


def stable_hash(*parts: int | str) -> int:
    """Return a 64-bit hash of integers and strings, the same on every platform and process.

    Parts are typed and length-prefixed, so ``("ab", "c")`` and ``("a", "bc")`` differ.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, str):
            data = part.encode()
            digest.update(b"s" + struct.pack("<Q", len(data)) + data)
        else:
            digest.update(b"i" + struct.pack("<Q", part & 0xFFFF_FFFF_FFFF_FFFF))
    return int.from_bytes(digest.digest(), "little")


def stable_uniform(*parts: int | str) -> float:
    """Return a number in [0, 1) that depends on ``parts`` alone (53 bits of :func:`stable_hash`)."""
    return (stable_hash(*parts) >> 11) / float(1 << 53)


def sha256_file(path: Path, chunk_bytes: int = 1 << 20) -> str:
    """Return the SHA-256 of a file in hexadecimal, reading ``chunk_bytes`` at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(chunk_bytes):
            digest.update(chunk)
    return digest.hexdigest()


def sample_file(path: Path, samples: int = 256, sample_bytes: int = 4096) -> str:
    """Return a hash of a file's size and of ``samples`` parts spread evenly over it, first and last bytes included."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(samples):
            file.seek(max(0, size - sample_bytes) * number // (samples - 1))
            digest.update(file.read(sample_bytes))
    return digest.hexdigest()
