"""Dynamic loss scaling for fp16, whose small gradients would otherwise round to zero."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LossScale:
    """Doubles after ``growth_interval`` good steps, halves after an overflow (Micikevicius et al. 2018, 3.2)."""

    scale: float = 2.0**16
    growth_interval: int = 1000
    good_steps: int = 0
    minimum: float = 1.0

    def update(self, overflow: bool) -> None:
        """Adapt after a step; ``overflow`` tells that its gradient was not finite."""
        if overflow:
            self.scale = max(self.scale / 2, self.minimum)
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.scale *= 2
            self.good_steps = 0
