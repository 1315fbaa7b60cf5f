"""Times between the ends of steps, without waiting for one before the next is queued."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch


class StepClock:
    """Marks moments in the device's work; on the CPU, where work is done when it is called for, in the host's."""

    def __init__(self, device: torch.device) -> None:
        """Make the first mark, after all that the device was given before."""
        self._device = device
        self._marks: list[Any] = []
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.mark()

    def mark(self) -> None:
        """Mark the end of what the device was given so far."""
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Return the time from each mark to the next; waits for the last."""
        if self._device.type != "cuda":
            return [after - before for before, after in pairwise(self._marks)]
        self._marks[-1].synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(self._marks)]
