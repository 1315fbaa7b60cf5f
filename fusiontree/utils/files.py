"""Files that are either whole or absent."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fusiontree.utils.errors import UserError


def fsync_directory(path: Path) -> None:
    """Make renames and new entries of a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, values: Any) -> None:
    """Write ``values`` as JSON by :func:`atomic_write`."""
    with atomic_write(path) as file:
        json.dump(values, file, indent=1)


def write_output(path: Path, text: str) -> None:
    """Write the file that a user named for a result, whole or not at all; a device, pipe or link in place."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_text(text, encoding="utf-8")
        return
    with atomic_write(path) as file:
        file.write(text)


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 file that a user named.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"'{path}' is not UTF-8: byte {error.object[error.start]:#04x} at position {error.start}; save it as UTF-8"
        ) from error


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside ``path`` that replaces it when the block ends without an error.

    The content is fsynced before the rename, so a reader or a crash sees the old file or the new one.
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes private files; runs are shared with the team
        os.replace(name, path)
        fsync_directory(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
