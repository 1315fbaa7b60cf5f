"""Files of a folder, kept open from one read to the next.

Opening is cheap on a local disk and a round trip on a shared file system, and a conversion reads thousands of small
tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

_MOST = 64
"""Files that are kept open; a checkpoint of many ranks has more than a process may open."""


class _File:
    """An open file that closes itself when nothing refers to it any more."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)
        os.posix_fadvise(self.number, 0, 0, os.POSIX_FADV_SEQUENTIAL)  # reads further ahead

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class OpenFiles:
    """Reads at any place of a folder's files, from several threads."""

    def __init__(self, folder: Path) -> None:
        """Open nothing yet."""
        self._folder = folder
        self._idle: list[tuple[str, _File]] = []
        self._lock = Lock()

    @contextmanager
    def lend(self, name: str) -> Iterator[int]:
        """Give a file descriptor that no other thread uses meanwhile: the system reads ahead for each by itself.

        Raises:
            OSError: there is no such file.
        """
        with self._lock:
            place = next((i for i, (held, _) in enumerate(self._idle) if held == name), None)
            file = self._idle.pop(place)[1] if place is not None else None
        file = file or _File(self._folder / name)
        yield file.number
        with self._lock:
            self._idle.append((name, file))
            del self._idle[:-_MOST]

    def read(self, name: str, start: int, length: int) -> bytearray:
        """Return bytes of a file, fewer where it ends.

        Raises:
            OSError: it cannot be read.
        """
        buffer = bytearray(length)
        view, done = memoryview(buffer), 0
        with self.lend(name) as file:
            while done < length and (size := os.preadv(file, [view[done:]], start + done)):
                done += size
        view.release()
        del buffer[done:]
        return buffer
