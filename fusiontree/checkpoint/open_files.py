"""Keeps the files of a folder open, and buffers allocated, between reads.

Opening a file is cheap on a local disk but costs a round trip on a shared file system, and a conversion reads thousands
of small tensors.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Condition, Lock

import torch
from torch import Tensor

_MOST = 64
"""Maximum number of open files; a checkpoint of many ranks has more files than a process may open."""


class _File:
    """An open file that is closed when its last reference is gone."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)
        os.posix_fadvise(self.number, 0, 0, os.POSIX_FADV_SEQUENTIAL)  # reads further ahead

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class OpenFiles:
    """Reads at any offset of a folder's files, from several threads."""

    def __init__(self, folder: Path) -> None:
        """Prepare; files are opened at first read."""
        self._folder = folder
        self._idle: list[tuple[str, _File]] = []
        self._lock = Lock()

    @contextmanager
    def lend(self, name: str) -> Iterator[int]:
        """Lend a file descriptor for exclusive use, since the system's read-ahead is per descriptor.

        Raises:
            OSError: the file does not exist.
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
        """Return ``length`` bytes of a file from ``start`` on, fewer if the file ends before.

        Raises:
            OSError: the file cannot be read.
        """
        buffer = bytearray(length)
        view, done = memoryview(buffer), 0
        with self.lend(name) as file:
            while done < length and (size := os.preadv(file, [view[done:]], start + done)):
                done += size
        view.release()
        del buffer[done:]
        return buffer


class Buffers:
    """Reusable buffers for rectangles, of limited total size: allocating new pages costs as much as reading into them.

    The memory is mapped separately: heap memory might not return to the system when this object is freed.
    """

    def __init__(self, size: int) -> None:
        self._left, self._free = size, list[Tensor]()
        self._changed = Condition()

    @contextmanager
    def of(self, size: int) -> Iterator[Tensor]:
        """Lend a uint8 tensor ``[size]``; waits for free memory. ``size`` is at most the total size."""
        whole = self._take(size)
        try:
            yield whole[:size]
        finally:
            with self._changed:
                self._free.append(whole)
                self._changed.notify_all()

    def _take(self, size: int) -> Tensor:
        with self._changed:
            while True:
                fitting = [b for b in self._free if size <= len(b) <= 4 * size]
                if fitting:
                    best = min(fitting, key=len)
                    self._free = [b for b in self._free if b is not best]
                    return best
                while self._free and self._left < size:
                    self._left += len(self._free.pop(0))
                if self._left >= size:
                    self._left -= size
                    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
                self._changed.wait()
