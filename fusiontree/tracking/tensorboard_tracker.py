"""TensorBoard as experiment tracker, through torch's own writer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fusiontree.tracking.config import LoggingConfig
from fusiontree.tracking.tracker import TRACKERS, TrackerStart, require_package

FLUSH_S = 10


class TensorboardTracker:
    """Writes event files."""

    def __init__(self, options: dict[str, Any], after_step: int) -> None:
        """Open a new event file; readers drop the steps after ``after_step`` of earlier files."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(options["folder"], purge_step=after_step + 1, flush_secs=FLUSH_S)
        self.writer.add_text("config", f"```yaml\n{options['config']}```", after_step)

    @classmethod
    def prepare(cls, config: LoggingConfig, run_dir: Path, values: dict[str, Any]) -> TrackerStart:
        """See :meth:`Tracker.prepare`."""
        require_package("tensorboard")
        folder = Path(config.tensorboard.folder or run_dir / "tensorboard").resolve()
        return TrackerStart({"folder": str(folder), "config": yaml.safe_dump(values, sort_keys=False)})

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """See :meth:`Tracker.log`; event files hold numbers only."""
        for name, value in values.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write values still in memory."""
        self.writer.close()


TRACKERS.register("tensorboard", TensorboardTracker)
