"""Settings of metrics, console and experiment trackers."""

from __future__ import annotations

from typing import Literal

from fusiontree.utils.settings import Section, setting


class WandbConfig(Section):
    """Weights & Biases; the local files remain complete."""

    mode: Literal["disabled", "offline", "online"] = setting("disabled", "Whether and how to log to wandb.")
    project: str = setting("fusiontree", "Project to log into.")
    entity: str | None = setting(None, "Team or user; absent means wandb's default.")
    name: str | None = setting(None, "Name of the run; absent means the run folder's name.")


class LoggingConfig(Section):
    """What is written while training."""

    log_interval: int = setting(
        10, "Steps between lines of metrics.jsonl and the console; 0 never.", unit="steps", ge=0
    )
    wandb: WandbConfig = setting(WandbConfig, "Weights & Biases.")
