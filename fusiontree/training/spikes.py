"""Loss spikes: detected before the optimizer step, by comparison with the losses of previous steps.

A spike is a loss far above the median of a window of previous losses. The distance is measured in median absolute
deviations: a few outliers in the window change neither the median nor this deviation, but would change a mean and a
standard deviation. Non-finite losses, and losses of steps that were not applied, do not enter the window. The policy
decides what follows: the step's gradient is not applied (``skip``), or the run returns to the newest checkpoint and
continues with the data after the spike (``rewind``; Chowdhery et al. 2022, PaLM, 5.1).
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
"""Minimum deviation, relative to the median: while the loss hardly changes, noise must not count as a spike."""


@dataclass
class SpikeFilter:
    """Judges the loss of each step. Its state is part of every checkpoint, so that a resumed run judges alike."""

    config: SpikeConfig
    losses: deque[float] = field(init=False)
    seq_len: int = 0
    skipped_in_a_row: int = 0

    def __post_init__(self) -> None:
        self.losses = deque(maxlen=self.config.window)

    def judge(self, loss: float, seq_len: int) -> str | None:
        """Return why a step's loss is a spike, or None; changes nothing.

        Args:
            loss: the global loss before the optimizer step.
            seq_len: row length of the step. Losses depend on it, so a new length starts with an empty window.
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
        """Add the loss of an applied step to the window."""
        if seq_len != self.seq_len:
            self.losses.clear()
            self.seq_len = seq_len
        self.skipped_in_a_row = 0
        if math.isfinite(loss):
            self.losses.append(loss)

    def count_skip(self, step: int, reason: str) -> None:
        """Count a step whose gradient was not applied.

        Raises:
            UserError: these are more than ``max_in_a_row`` consecutive steps: the loss stays high, which is no spike.
        """
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.config.max_in_a_row:
            raise UserError(
                f"step {step}: {self.skipped_in_a_row} steps in a row were skipped ({reason}), more than "
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
        """Restore :meth:`state_dict`; None (a checkpoint of an earlier version) starts with an empty window."""
        values = values or {"losses": [], "seq_len": 0, "skipped_in_a_row": 0}
        self.losses = deque(values["losses"], maxlen=self.config.window)
        self.seq_len, self.skipped_in_a_row = values["seq_len"], values["skipped_in_a_row"]


@dataclass(frozen=True)
class Rewind:
    """The run returned to the checkpoint of ``to_step`` and continued with the data after step ``from_step``."""

    from_step: int
    to_step: int
    data: dict[str, Any]
    """Position in the data from which it continued."""


class Rewinds:
    """The rewinds of a run, in RUN/rewinds.json: a resume from any checkpoint repeats the rewinds after it."""

    def __init__(self, run_dir: Path, limit: int) -> None:
        """Read nothing yet; ``limit`` is the maximum number of rewinds to the same step."""
        self.file = run_dir / "rewinds.json"
        self.limit = limit
        self.applied = 0
        self._all: list[Rewind] = []

    def restore(self, applied: int) -> None:
        """Read the file, after a checkpoint was loaded that was saved after the first ``applied`` rewinds.

        Raises:
            UserError: the file is damaged.
        """
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
        """Return the run's rewinds and a further one, from ``step`` back to the checkpoint of ``to_step``.

        Raises:
            UserError: the run has returned to this checkpoint ``limit`` times.
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
        """Write ``rewinds`` to the file; on the main rank, before the run continues from the checkpoint."""
        with atomic_write(self.file) as file:
            json.dump([asdict(rewind) for rewind in rewinds], file)

    def data_after(self, step: int) -> dict[str, Any] | None:
        """Return the data position that rewinds to ``step`` continued from, or None; they then count as applied."""
        found = None
        while self.applied < len(self._all) and self._all[self.applied].to_step == step:
            found = self._all[self.applied].data
            self.applied += 1
        return found
