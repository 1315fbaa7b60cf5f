"""Settings of metrics, console and experiment trackers."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import model_validator

from fusiontree.utils.errors import UserError
from fusiontree.utils.settings import PathText, Section, setting, warn_of_former_name


class WandbConfig(Section):
    """Weights & Biases."""

    mode: Literal["offline", "online"] = setting(
        "online", "offline writes to RUN/wandb, from where 'wandb sync' sends it later."
    )
    project: str = setting("fusiontree", "Project to log into.")
    entity: str | None = setting(None, "Team or user; absent means wandb's default.")
    name: str | None = setting(None, "Name of the run; absent means the run folder's name.")


class TensorboardConfig(Section):
    """TensorBoard."""

    folder: PathText | None = setting(None, "Folder of the event files; absent means RUN/tensorboard.")


class LoggingConfig(Section):
    """Metrics, console and experiment trackers; the files of the run folder are complete without any tracker."""

    log_interval: int = setting(
        10, "Steps between lines of metrics.jsonl and the console; 0 never.", unit="steps", ge=0
    )
    trackers: list[str] = setting(list, "Experiment trackers to send metrics to: wandb, tensorboard, or a plugin's.")
    layer_metrics: list[str] = setting(
        list, "Registered metrics of each layer's branches to compute on logged steps; see docs/extend/metric.md."
    )
    wandb: WandbConfig = setting(WandbConfig, "Weights & Biases.")
    tensorboard: TensorboardConfig = setting(TensorboardConfig, "TensorBoard.")
    options: dict[str, dict[str, Any]] = setting(dict, "Settings of a plugin's trackers, by name of the tracker.")

    @model_validator(mode="before")
    @classmethod
    def _mode_alone_selected_wandb(cls, values: Any) -> Any:
        """Read the former way to select wandb: ``wandb.mode``, disabled by default; any other mode selected it."""
        wandb = values.get("wandb") if isinstance(values, dict) else None
        if not isinstance(wandb, dict) or "mode" not in wandb:
            return values
        if wandb["mode"] in ("disabled", False):
            others = [name for name in values.get("trackers") or [] if name != "wandb"]
            warn_of_former_name("logging.wandb.mode=disabled", "logging.trackers without wandb")
            kept = {key: value for key, value in wandb.items() if key != "mode"}
            return values | {"trackers": others, "wandb": kept}
        if "trackers" not in values:
            warn_of_former_name("logging.wandb.mode without logging.trackers", "logging.trackers=[wandb]")
            return values | {"trackers": ["wandb"]}
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        from fusiontree.tracking.tracker_process import TRACKERS

        for name in self.trackers:
            try:
                TRACKERS.get(name)
            except UserError as error:
                raise ValueError(f"trackers: {error}") from None
        if repeated := {name for name in self.trackers if self.trackers.count(name) > 1}:
            raise ValueError(f"trackers lists {', '.join(sorted(repeated))} twice; list each tracker once")
        if unused := self.options.keys() - set(self.trackers):
            raise ValueError(f"options: {', '.join(sorted(unused))} is not in logging.trackers; add it there")
        return self
