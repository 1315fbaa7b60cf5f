"""Finds stragglers: ranks that slow the others down.

In a synchronous step all ranks take equally long, as fast ranks wait in collectives. So two times are measured that do
not depend on other ranks: from the end of a step to the first collective of the next step (data loading and host work),
and of a small fixed matrix product (the device).
"""

from __future__ import annotations

import json
import socket
from statistics import median
from typing import Any

from fusiontree.engines.base import Engine
from fusiontree.supervision.device_speed import Probe

_WORTH_NAMING = 0.05
"""Differences of host work below this share of a step are not reported."""


class StragglerWatch:
    """Collects this rank's times and, when asked, compares them with those of other ranks."""

    def __init__(self, engine: Engine, factor: float) -> None:
        """Prepare; a rank is slow at ``factor`` times the middle rank's time."""
        self.engine = engine
        self.factor = factor
        self._probe: Probe | None = None
        self._host_s: list[float] = []
        self._step_s: list[float] = []

    def note(self, host_s: float, step_s: float) -> None:
        """Take one step's time outside collectives, and its whole time, in seconds."""
        self._host_s.append(host_s)
        self._step_s.append(step_s)

    def compare(self) -> list[dict[str, Any]]:
        """Return the slow ranks since the last comparison; all ranks call this together and get the same."""
        if not self._step_s:
            return []
        self._probe = self._probe or Probe(self.engine.device)
        mine = {
            "host": socket.gethostname(),
            "own_s": sum(self._host_s) / len(self._host_s),
            "matmul_s": self._probe.matmul_s(),
            "step_s": sum(self._step_s) / len(self._step_s),
        }
        self._host_s, self._step_s = [], []
        ranks = [json.loads(text) for text in self.engine.gather_text(json.dumps(mine))]
        return slow_ranks(ranks, self.factor)


def slow_ranks(ranks: list[dict[str, Any]], factor: float) -> list[dict[str, Any]]:
    """Return a record for every rank whose host work or device is slow.

    Args:
        ranks: of every rank its host, seconds of host work per step (``own_s``), of a step and of the matrix product.
        factor: a rank is slow at this many times the median.
    """
    step_s = median(rank["step_s"] for rank in ranks)
    slow = []
    for key, what in (("own_s", "data and host work"), ("matmul_s", "computing")):
        times = [rank[key] for rank in ranks]
        # With two ranks there is no middle: the faster one is the measure.
        middle = min(times) if len(times) == 2 else median(times)
        for number, rank in enumerate(ranks):
            costly = key == "matmul_s" or rank[key] - middle > _WORTH_NAMING * step_s
            if rank[key] > factor * middle and costly:
                times_slower = rank[key] / max(middle, 1e-9)
                slow.append(
                    {
                        "rank": number,
                        "host": rank["host"],
                        "what": what,
                        "seconds": round(rank[key], 6),
                        "middle_seconds": round(middle, 6),
                        "reason": f"rank {number} ({rank['host']}) is {times_slower:.1f} times slower in {what}",
                    }
                )
    return slow
