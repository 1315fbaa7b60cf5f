"""Threads that can be told to end because their result is no longer wanted."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable


class Stopped(Exception):
    """The thread was told to end while it waited for something."""


class StoppableThread(threading.Thread):
    """A thread that ends soon after :meth:`stop`, because its waiting functions check :func:`stop_wanted`.

    It never keeps the program alive.
    """

    def __init__(self, target: Callable[[], None], name: str) -> None:
        """Prepare; ``target`` may end by raising :class:`Stopped`."""
        super().__init__(name=name, daemon=True)
        self._function = target
        self.stop_wanted = False

    def run(self) -> None:
        """Run the target."""
        with contextlib.suppress(Stopped):
            self._function()

    def stop(self) -> None:
        """Ask the thread to end."""
        self.stop_wanted = True


def stop_wanted() -> bool:
    """Return whether the calling thread was told to end; False in threads other than :class:`StoppableThread`."""
    thread = threading.current_thread()
    return isinstance(thread, StoppableThread) and thread.stop_wanted
