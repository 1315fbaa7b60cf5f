"""New files that are hashed while they are written, and synced."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from fusiontree.checkpoint.manifest import FileEntry
from fusiontree.checkpoint.rows import Tensors


class HashedFile:
    """A file in parts, each with its own hash; errors name the file."""

    def __init__(self, path: Path) -> None:
        """Create the file.

        Raises:
            OSError: it exists, or cannot be created.
        """
        self.path = path
        self.size = 0
        self._file = path.open("xb")
        self._parts: list[tuple[int, str]] = []
        self._digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes.

        Raises:
            OSError: the disk is full …
        """
        try:
            self._file.write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._digest.update(data)
        self.size += len(data)

    def end_part(self) -> None:
        """End a part: what is written now begins the next."""
        self._parts.append((self.size - sum(size for size, _ in self._parts), self._digest.hexdigest()))
        self._digest = hashlib.sha256()

    def finish(self) -> FileEntry:
        """End the last part, make the file durable, and return its entry in the manifest.

        Raises:
            OSError: the disk is full …
        """
        self.end_part()
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        return FileEntry(self.size, tuple(self._parts), whole=len(self._parts) == 1)

    def close(self) -> None:
        """Close the file, finished or not."""
        with contextlib.suppress(OSError):  # of what a failed write left in the buffer
            self._file.close()


class TableFile:
    """A file about all tensors that is written some tensors at a time. Use it as a context manager."""

    name: str
    """File name in the checkpoint."""

    def __init__(self, folder: Path, tensors: Tensors, files: Sequence[str]) -> None:
        """Create the file.

        Args:
            folder: of the checkpoint.
            tensors: all tensors.
            files: names of the tensor files, which rows refer to by number.

        Raises:
            OSError: it cannot be created.
        """
        self._tensors, self._files = tensors, files
        self._out = HashedFile(folder / self.name)

    def add(self, rows: np.ndarray) -> None:
        """Write the next tensors.

        Args:
            rows: all rows of these tensors, sorted by tensor and offset.

        Raises:
            OSError: the disk is full …
        """
        raise NotImplementedError

    def finish(self) -> FileEntry:
        """Write the end and make the file durable; return its entry in the manifest.

        Raises:
            OSError: the disk is full …
        """
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()
