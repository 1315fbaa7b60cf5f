"""Stop signals: noted when they come, acted on by all ranks at the same step."""

from __future__ import annotations

import os
import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Notes SIGTERM, SIGINT and SIGUSR1 while active; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def requested(self) -> bool:
        """Return whether this process was asked to stop."""
        return self.signal_name is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name


def exit_on_sigusr1(code: int) -> None:
    """Exit at once on SIGUSR1 until :class:`StopRequest` handles it: there is nothing to save yet.

    Schedulers warn with SIGUSR1. SIGTERM keeps its meaning: launchers end the peers of a failed process with it.

    Args:
        code: exit code that tells a scheduler to start the run again.
    """
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(code))
