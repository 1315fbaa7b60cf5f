"""The console line of a run: where it is, how fast, how long still."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any


def clock(seconds: float) -> str:
    """Return a duration as ``1d 02:03:04`` or ``02:03:04``."""
    days, rest = divmod(int(seconds), 86400)
    text = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}d {text}" if days else text


def short(number: float) -> str:
    """Return a count with a metric suffix: 12.3k, 4.56M."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def spoken(say: Callable[[str], None], what: str, every_s: float = 10.0) -> Callable[[int, int], None]:
    """Return a function of bytes done and in all that says how far ``what`` is, now and then."""
    spoke = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal spoke
        if time.monotonic() - spoke >= every_s:
            spoke = time.monotonic()
            say(f"{what}: {done / 1e9:.1f} of {total / 1e9:.1f} GB")

    return report


class Progress:
    """Estimates the time left from the last steps' pace, so a pause or a slow start does not spoil it."""

    def __init__(self, max_steps: int, window: int = 50) -> None:
        self.max_steps = max_steps
        self._marks: deque[tuple[int, float]] = deque(maxlen=window)

    def mark(self, step: int) -> None:
        """Note that ``step`` just ended."""
        self._marks.append((step, time.monotonic()))

    def eta_s(self) -> float | None:
        """Seconds left, or None before there is a pace."""
        if len(self._marks) < 2:
            return None
        (first, begin), (last, end) = self._marks[0], self._marks[-1]
        return (self.max_steps - last) * (end - begin) / max(1, last - first)

    def line(self, values: dict[str, Any]) -> str:
        """Return the console line of a logged step."""
        parts = [
            f"step {values['step']}/{self.max_steps}",
            f"loss {values['loss']:.4f}",
            f"grad {values['grad_norm']:.3g}",
            f"lr {values['lr']:.2e}",
            f"{short(values['tokens_per_s'])} tok/s",
        ]
        if values.get("mfu") is not None:
            parts.append(f"mfu {values['mfu']:.1%}")
        eta = self.eta_s()
        parts.append(f"eta {clock(eta)}" if eta is not None else "eta --:--:--")
        return "  ".join(parts)
