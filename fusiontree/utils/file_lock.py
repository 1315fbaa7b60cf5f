"""Locks between processes of one machine that die with their holder."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from fusiontree.utils.threads import Stopped, stop_wanted

_POLL_S = 0.02


class FileLock:
    """An advisory lock on a file (``flock``). The system releases it when the process ends, however it ends.

    Two objects on the same file exclude each other, also in one process. An object must not be used by several threads.
    """

    def __init__(self, path: Path) -> None:
        """Name the lock; the file is created when it is first acquired."""
        self.path = path
        self._descriptor = -1

    def acquire(self, *, shared: bool = False, wait: bool = True) -> bool:
        """Acquire the lock; return whether it was acquired.

        Args:
            shared: several holders may share the lock; False excludes all others.
            wait: False returns at once if another holder excludes this one.

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
            self.close()  # the file was removed while we waited: its lock no longer excludes anybody

    def share_again(self) -> bool:
        """Acquire, shared and without waiting, a lock that was held before; return whether it was acquired.

        Does not check that the file still exists, for callers that acquire often and notice its removal themselves.
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
        """Let others acquire the lock."""
        if self._descriptor >= 0:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Release the lock and close its file."""
        if self._descriptor >= 0:
            self.release()  # a forked child may have the file open still
            os.close(self._descriptor)
            self._descriptor = -1

    __del__ = close
