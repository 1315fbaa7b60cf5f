"""Locks between processes of one machine that die with their holder."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from fusiontree.utils.threads import Stopped, stop_wanted

_POLL_S = 0.02


class FileLock:
    """An advisory lock on a file (``flock``). A process that ends, however it ends, holds it no more.

    Two objects on the same file exclude each other, in one process too. An object is not for several threads at once.
    """

    def __init__(self, path: Path) -> None:
        """Name the lock; the file is made when it is first taken."""
        self.path = path
        self._descriptor = -1

    def acquire(self, *, shared: bool = False, wait: bool = True) -> bool:
        """Take the lock; return whether it was got.

        Args:
            shared: several holders may share; else only one holds it.
            wait: False gives up at once when another holds it.

        Raises:
            Stopped: the thread was told to end while it waited.
        """
        while True:
            if self._descriptor < 0:
                self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(self._descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    return False
                if stop_wanted():
                    raise Stopped from None
                time.sleep(_POLL_S)
                continue
            if self._is_current():
                return True
            self.close()  # the file was removed while we waited: its lock excludes nobody any more

    def share_again(self) -> bool:
        """Take a lock held before, shared, at once; return whether it was got.

        Whether the file is still the lock's is not looked at: for callers who see that in another way, often.
        """
        if self._descriptor < 0:
            return False
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _is_current(self) -> bool:
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return False
        mine = os.fstat(self._descriptor)
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def release(self) -> None:
        """Let others take the lock."""
        if self._descriptor >= 0:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Release the lock and close its file."""
        if self._descriptor >= 0:
            self.release()  # a forked child may have the file open still
            os.close(self._descriptor)
            self._descriptor = -1

    __del__ = close
