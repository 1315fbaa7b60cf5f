"""Lines of progress of long tasks."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

_EVERY_S = 2.0


class BuildProgress:
    """Reports every few seconds how much of the input is done, the rate, and the remaining time."""

    def __init__(self, what: str, total_bytes: int, report: Callable[[str], object]) -> None:
        """Begin; ``what`` starts each line."""
        self._what, self._total, self._report = what, total_bytes, report
        self._done = self._skipped = self._text = 0
        self._began = self._said = time.monotonic()

    def add(self, input_bytes: int, text_bytes: int = 0, *, skipped: bool = False) -> None:
        """Add finished bytes of input, and the bytes of text in it; ``skipped`` if an earlier run did the work."""
        self._done += input_bytes
        if skipped:
            self._skipped += input_bytes
        else:
            self._text += text_bytes
        if time.monotonic() - self._said > _EVERY_S:
            self._said = time.monotonic()
            self._report(self.line())

    def reached(self, input_bytes: int) -> None:
        """Set the total finished bytes of the input to ``input_bytes``."""
        self.add(input_bytes - self._done, input_bytes - self._done)

    def line(self) -> str:
        """Return the progress line."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        left = max(0, self._total - self._done)
        rate = (self._done - self._skipped) / seconds
        line = f"{self._what}: {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB"
        line += f", {self._text / seconds / 1e6:.1f} MB/s"
        return f"{line}, {timedelta(seconds=round(left / rate))} left" if left and rate else line

    def end(self) -> None:
        """Report the final line."""
        self._report(self.line())
        if self._skipped:
            self._report(f"{self._skipped / 1e6:,.0f} MB were finished before and not done again")
