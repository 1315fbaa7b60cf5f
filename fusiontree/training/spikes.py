"""Loss spikes: seen before the optimizer step, against the losses just before.

A spike is a loss far above the median of a window of earlier ones, measured in their median absolute deviation: both
stay put when the window holds a few wild values, where a mean and a standard deviation do not. Losses that are not
finite, and those of steps that were not applied, never enter the window. What follows is the policy's: leave the
step's gradient out (``skip``), or go back to the newest checkpoint and go on behind the rows that led here
(``rewind``, Chowdhery et al. 2022, PaLM, 5.1).
"""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from fusiontree.training.config import SpikeConfig
from fusiontree.utils.errors import UserError
from fusiontree.utils.files import atomic_write

_TO_DEVIATION = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
_FLOOR = 0.01
"""Least deviation, as a share of the median: a loss that hardly moves must not make noise a spike."""


@dataclass
class SpikeFilter:
    """Judges one loss a step; its state is part of every checkpoint, so that a resumed run judges alike."""

    config: SpikeConfig
    losses: deque[float] = field(init=False)
    seq_len: int = 0
    skipped_in_a_row: int = 0

    def __post_init__(self) -> None:
        self.losses = deque(maxlen=self.config.window)

    def judge(self, loss: float, seq_len: int) -> str | None:
        """Return what is wrong with a step's loss, or None; changes nothing.

        Args:
            loss: the global loss before the optimizer step.
            seq_len: row length of the step; another length has another loss, so the window starts anew.
        """
        if self.config.policy == "off" or seq_len != self.seq_len or not math.isfinite(loss):
            return None
        if len(self.losses) < self.config.window // 4:
            return None
        middle = median(self.losses)
        spread = _TO_DEVIATION * median(abs(value - middle) for value in self.losses)
        limit = middle + self.config.threshold * max(spread, _FLOOR * abs(middle))
        if loss <= limit:
            return None
        return f"loss spike: {loss:.4f} is over {limit:.4f} (median {middle:.4f} of the last {len(self.losses)} losses)"

    def accept(self, loss: float, seq_len: int) -> None:
        """Take the loss of an applied step into the window."""
        if seq_len != self.seq_len:
            self.losses.clear()
            self.seq_len = seq_len
        self.skipped_in_a_row = 0
        if math.isfinite(loss):
            self.losses.append(loss)

    def count_skip(self, step: int, reason: str) -> None:
        """Count a step whose gradient was left out.

        Raises:
            UserError: more than ``max_in_a_row`` in a row: this is the run's new level, not a spike.
        """
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.config.max_in_a_row:
            raise UserError(
                f"step {step}: {self.skipped_in_a_row} steps in a row were left out ({reason}), more than "
                f"training.spikes.max_in_a_row {self.config.max_in_a_row}; the run diverges or its data changed: look "
                f"at the losses, lower the learning rate, or set training.spikes.policy=off"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {
            "losses": list(self.losses),
            "seq_len": self.seq_len,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, values: dict[str, Any] | None) -> None:
        """Take back :meth:`state_dict`; None (an older checkpoint) starts anew."""
        values = values or {"losses": [], "seq_len": 0, "skipped_in_a_row": 0}
        self.losses = deque(values["losses"], maxlen=self.config.window)
        self.seq_len, self.skipped_in_a_row = values["seq_len"], values["skipped_in_a_row"]


@dataclass(frozen=True)
class Rewind:
    """Once the run had ended step ``to_step`` it went on with the data behind step ``from_step``."""

    from_step: int
    to_step: int
    data: dict[str, Any]
    """Where in the data it went on."""


class Rewinds:
    """The rewinds of a run, in RUN/rewinds.json: whatever checkpoint a resume starts from, they happen again."""

    def __init__(self, run_dir: Path, limit: int) -> None:
        """Read nothing yet; ``limit`` is how many may go back to the same step."""
        self.file = run_dir / "rewinds.json"
        self.limit = limit
        self.applied = 0
        self._all: list[Rewind] = []

    def restore(self, applied: int) -> None:
        """Read the file; a checkpoint that was saved after ``applied`` of the rewinds was loaded."""
        self.applied = applied
        self._all = []
        if self.file.is_file():
            try:
                self._all = [Rewind(**values) for values in json.loads(self.file.read_text(encoding="utf-8"))]
            except (OSError, ValueError, TypeError) as error:
                raise UserError(
                    f"{self.file} cannot be read ({error}); it says where the run left out data after loss spikes. "
                    f"Restore it, or delete it to train on that data"
                ) from error

    def plan(self, step: int, to_step: int, data: dict[str, Any], reason: str) -> list[Rewind]:
        """Return the run's rewinds with one more, from ``step`` back to the checkpoint of ``to_step``.

        Raises:
            UserError: the run went back there too often already.
        """
        same = sum(rewind.to_step == to_step for rewind in self._all)
        if same >= self.limit:
            raise UserError(
                f"step {step}: {reason}; the run went back to step {to_step} {same} times already, as often as "
                f"training.spikes.max_in_a_row allows: look at the losses, lower the learning rate, resume from an "
                f"earlier checkpoint, or set training.spikes.policy=off"
            )
        return [*self._all[: self.applied], Rewind(step, to_step, data)]

    def write(self, rewinds: list[Rewind]) -> None:
        """Make ``rewinds`` the run's; on the main rank, before anything goes back."""
        with atomic_write(self.file) as file:
            json.dump([asdict(rewind) for rewind in rewinds], file)

    def data_after(self, step: int) -> dict[str, Any] | None:
        """Return where the data goes on after ``step``, if a rewind says so; it then counts as applied."""
        found = None
        while self.applied < len(self._all) and self._all[self.applied].to_step == step:
            found = self._all[self.applied].data
            self.applied += 1
        return found
