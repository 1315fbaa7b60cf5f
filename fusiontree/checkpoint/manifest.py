"""SHA-256 hashes of a checkpoint's files, to detect damage before values are used.

DCP, like most formats, detects a truncated file but silently loads a flipped byte. Tensor files have one hash per part
(one part per rectangle of a tensor, without gaps), so a rank that reads only some parts of a file verifies exactly
those parts while it reads them. Their hashes are in the index (:mod:`fusiontree.checkpoint.index`); in checkpoints of
version 2 they are in the manifest itself. Other files have one hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any, BinaryIO

from fusiontree.checkpoint.folders import MANIFEST
from fusiontree.utils.errors import UserError
from fusiontree.utils.files import atomic_write
from fusiontree.utils.hashing import sha256_file

Report = Callable[[int, int], None]
"""Called with the bytes done and the total bytes."""

_FORMAT = "fusiontree-checkpoint"
_CHUNK = 4 << 20


class CheckpointDamage(UserError):
    """A file of a checkpoint is missing or differs from its recorded hash."""


@dataclass(frozen=True)
class FileEntry:
    """The manifest's entry for one file."""

    size: int
    parts: tuple[tuple[int, str], ...]
    """Length in bytes and SHA-256 of each part, in order; none if they are in the index."""
    whole: bool = True
    """True if the file is hashed as a single part; False for tensor files with one part per rectangle."""

    @property
    def indexed(self) -> bool:
        """True for a tensor file whose hashes are in the index."""
        return not self.whole and not self.parts

    @cached_property
    def _part_at(self) -> dict[int, tuple[int, str]]:
        starts = accumulate((length for length, _ in self.parts), initial=0)
        return {} if self.whole else dict(zip(starts, self.parts, strict=False))

    def digest_at(self, start: int, length: int) -> str | None:
        """Return the recorded SHA-256 of exactly these bytes of the file, or None if it was hashed as a whole."""
        recorded, digest = self._part_at.get(start, (-1, ""))
        return digest if recorded == length else None

    def to_dict(self) -> dict[str, Any]:
        """Return the entry in the manifest's JSON form."""
        if self.whole:
            return {"bytes": self.size, "sha256": self.parts[0][1]}
        if self.indexed:
            return {"bytes": self.size, "indexed": True}
        return {"bytes": self.size, "parts": [list(part) for part in self.parts]}


def _file_entry(values: dict[str, Any]) -> FileEntry:
    if values.get("indexed"):
        return FileEntry(int(values["bytes"]), (), whole=False)
    whole = "parts" not in values
    parts = [[values["bytes"], values["sha256"]]] if whole else values["parts"]
    entry = FileEntry(int(values["bytes"]), tuple((int(length), str(digest)) for length, digest in parts), whole)
    if sum(length for length, _ in entry.parts) != entry.size:
        raise ValueError("the parts of a file do not add up to it")
    return entry


def file_entries(files: list[Path], folder: Path) -> dict[str, dict[str, Any]]:
    """Hash ``files``, which are under ``folder``, and return ``{relative name: entry}``."""
    entries = {}
    for file in sorted(files):
        size = file.stat().st_size
        entries[str(file.relative_to(folder))] = FileEntry(size, ((size, sha256_file(file)),)).to_dict()
    return entries


def _digest(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Write the manifest; its presence declares the folder complete."""
    version = 3 if any("indexed" in entry for entry in entries.values()) else 2
    content = {"format": _FORMAT, "version": version, "sha256": _digest(entries), "files": entries}
    with atomic_write(folder / MANIFEST) as file:
        json.dump(content, file, indent=None, sort_keys=True)


def read_manifest(folder: Path) -> dict[str, FileEntry]:
    """Return the manifest's entries by file name.

    Raises:
        CheckpointDamage: the manifest cannot be read, or differs from its hash.
    """
    manifest = folder / MANIFEST
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        files = content["files"]
        entries = {name: _file_entry(values) for name, values in files.items()}
        changed = content["version"] > 1 and content["sha256"] != _digest(files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointDamage(f"{manifest} cannot be read ({error}); the checkpoint is not usable") from error
    if changed:
        raise CheckpointDamage(f"{manifest} differs from the SHA-256 it holds of itself; the checkpoint is not usable")
    for name in entries:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointDamage(f"{manifest} names '{name}', which lies outside the checkpoint")
    return entries


def check_size(file: Path, entry: FileEntry) -> None:
    """Check that a file exists and has its recorded size.

    Raises:
        CheckpointDamage: the file is missing or has another size.
    """
    try:
        size = file.stat().st_size
    except OSError:
        raise CheckpointDamage(f"{file} is missing") from None
    if size != entry.size:
        raise CheckpointDamage(f"{file} has {size} bytes, its manifest says {entry.size}")


def check_file(file: Path, entry: FileEntry, progress: Callable[[int], None] = lambda size: None) -> None:
    """Read one file and compare it with its entry.

    Raises:
        CheckpointDamage: the file is missing, or its size or hash differs.
    """
    check_size(file, entry)
    if entry.indexed:
        raise CheckpointDamage(f"{file}: its manifest refers to an index that it does not list")
    start = 0
    try:
        with file.open("rb", buffering=0) as stream:
            for length, digest in entry.parts:
                if _hash_part(stream, length, progress) != digest:
                    where = f" (bytes {start} to {start + length})" if len(entry.parts) > 1 else ""
                    raise CheckpointDamage(f"{file} differs from the SHA-256 in its manifest{where}")
                start += length
    except OSError as error:
        raise CheckpointDamage(f"{file} cannot be read: {error.strerror}") from error


def _hash_part(stream: BinaryIO, length: int, progress: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    while length and (chunk := stream.read(min(_CHUNK, length))):
        digest.update(chunk)
        length -= len(chunk)
        progress(len(chunk))
    return digest.hexdigest()


class ByteCount:
    """Adds up bytes from several threads and reports them."""

    def __init__(self, total: int, report: Report | None) -> None:
        self.total, self._report = total, report
        self._done, self._lock = 0, Lock()

    def add(self, size: int) -> None:
        """Add ``size`` bytes."""
        if self._report:
            with self._lock:
                self._done += size
                self._report(self._done, self.total)
