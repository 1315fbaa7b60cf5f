"""The length curriculum: row length by step.

A stage of shorter rows splits each row of ``seq_len``. So it changes neither the number of tokens per step nor the
order of the text, and every epoch visits every row once even if a stage ends within the epoch.
"""

from __future__ import annotations

from collections.abc import Sequence


class LengthSchedule:
    """Row lengths by step: the stages one after the other, then ``seq_len`` for the rest of the run."""

    def __init__(self, seq_len: int, stages: Sequence[Sequence[int]] | None) -> None:
        """Prepare.

        Args:
            seq_len: final length of a row.
            stages: ``[row length, steps]`` each.

        Raises:
            ValueError: a stage's length does not divide ``seq_len``, or a stage has less than one step.
        """
        self.seq_len = seq_len
        self.stages = [(int(length), int(steps)) for length, steps in stages or []]
        for length, steps in self.stages:
            if length < 2 or steps < 1 or seq_len % length:
                raise ValueError(
                    f"curriculum stage [{length}, {steps}] needs a length of at least 2 that divides seq_len "
                    f"{seq_len}, and at least one step"
                )

    def length(self, step: int) -> int:
        """Return the row length of a step; the first step is 1."""
        for length, steps in self.stages:
            if step <= steps:
                return length
            step -= steps
        return self.seq_len
