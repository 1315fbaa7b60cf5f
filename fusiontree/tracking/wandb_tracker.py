"""Weights & Biases as experiment tracker."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusiontree.tracking.config import LoggingConfig
from fusiontree.tracking.experiment_id import experiment_id
from fusiontree.tracking.tracker import TRACKERS, TrackerStart, require_package
from fusiontree.utils.environment import wandb_server

REACH_S = 5.0
"""Limit of the wait for the server's answer."""


class WandbTracker:
    """One wandb run per run folder, which every start of the run continues."""

    def __init__(self, options: dict[str, Any], after_step: int) -> None:
        """Start or continue the wandb run."""
        import wandb

        self.run = wandb.init(**options)

    @classmethod
    def prepare(cls, config: LoggingConfig, run_dir: Path, values: dict[str, Any]) -> TrackerStart:
        """See :meth:`Tracker.prepare`.

        The mode ``online`` becomes ``offline`` at once if the server does not answer: wandb itself notices slowly, and
        may hang.
        """
        require_package("wandb")
        section = config.wandb
        mode, note = section.mode, None
        if mode == "online" and (problem := unreachable(wandb_server(), REACH_S)):
            mode = "offline"
            note = (
                f"the wandb server {wandb_server()} cannot be reached ({problem}); metrics go to {run_dir}/wandb, "
                f"send them later with 'wandb sync'"
            )
        options = {
            "project": section.project,
            "entity": section.entity,
            "name": section.name or run_dir.resolve().name,
            "id": experiment_id(run_dir),
            "resume": "allow",
            "mode": mode,
            "dir": str(run_dir.resolve()),
            "config": values,
        }
        return TrackerStart(options, note)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """See :meth:`Tracker.log`."""
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        """Send values still in memory."""
        self.run.finish()


def unreachable(address: str, seconds: float) -> str | None:
    """Return the reason why ``address`` gives no HTTP answer within ``seconds``, or None if it answers anything."""
    try:
        with urllib.request.urlopen(address, timeout=seconds):
            return None
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


TRACKERS.register("wandb", WandbTracker)
