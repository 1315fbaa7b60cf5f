"""What a run writes down: metrics.jsonl, events.jsonl and their mirror in wandb."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from fusiontree.training.config import WandbConfig
from fusiontree.utils.errors import UserError
from fusiontree.utils.files import atomic_write


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file; a last line cut off by a crash is left out."""
    if not path.is_file():
        return []
    records = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines):
        try:
            if line:
                records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines) - 2:
                raise
    return records


class Records:
    """Appends to the run's record files. On other ranks than the main one it writes nothing."""

    def __init__(self, run_dir: Path, enabled: bool) -> None:
        """Open for a run folder that exists; ``enabled`` on the main rank only."""
        self.metrics_path = run_dir / "metrics.jsonl"
        self.events_path = run_dir / "events.jsonl"
        self.enabled = enabled
        self._mirror: Any = None

    def open_mirror(self, config: WandbConfig, run_dir: Path, values: dict[str, Any]) -> None:
        """Start the wandb mirror.

        Raises:
            UserError: it is configured and wandb is not installed.
        """
        if not self.enabled or config.mode == "disabled":
            return
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"logging.wandb.mode is {config.mode}, but wandb is not installed; pip install 'fusiontree[wandb]' "
                f"or set logging.wandb.mode=disabled"
            ) from error
        identity = run_dir.resolve().name
        try:
            self._mirror = wandb.init(
                project=config.project,
                entity=config.entity,
                name=config.name or identity,
                id=identity,
                resume="allow",
                mode=config.mode,
                dir=str(run_dir),
                config=values,
            )
        except Exception as error:  # the mirror must never cost the run
            self.event("wandb_failed", reason=str(error))

    def truncate_metrics(self, step: int) -> None:
        """Move lines after ``step`` to metrics.discarded.jsonl: those steps are about to be done again."""
        if not self.enabled:
            return
        records = read_records(self.metrics_path)
        later = [r for r in records if r["step"] > step]
        if later:
            with self.metrics_path.with_name("metrics.discarded.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(r) + "\n" for r in later)
        with atomic_write(self.metrics_path) as file:
            file.writelines(json.dumps(r) + "\n" for r in records if r["step"] <= step)

    def metrics(self, values: dict[str, Any]) -> None:
        """Append one logged step."""
        if not self.enabled:
            return
        self._append(self.metrics_path, values)
        if self._mirror is not None:
            self._mirror.log(_flat(values), step=values["step"])

    def event(self, event: str, **details: Any) -> None:
        """Append something that happened: a start, a resume, a save, a skipped step, a fault."""
        if self.enabled:
            now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            self._append(self.events_path, {"time": now, "unix_time": time.time(), "event": event, **details})

    def close(self) -> None:
        """End the mirror."""
        if self._mirror is not None:
            self._mirror.finish()

    @staticmethod
    def _append(path: Path, values: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            flat |= {f"{prefix}{key}/{i}": v for i, v in enumerate(value)}
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat
