"""Checks beside training: nodes at the start, copies of parameters and the ranks' speed at intervals."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fusiontree.engines.base import Engine
from fusiontree.supervision import node_health
from fusiontree.supervision.config import SupervisionConfig
from fusiontree.supervision.replica_check import find_differences
from fusiontree.supervision.stragglers import StragglerWatch
from fusiontree.tracking.records import Records
from fusiontree.utils.errors import UserError

log = logging.getLogger(__name__)


class RunMonitors:
    """Calls the checks when they are due and writes what they find into events.jsonl; on all ranks together."""

    def __init__(self, engine: Engine, config: SupervisionConfig, records: Records) -> None:
        """Prepare; nothing is measured yet."""
        self.engine, self.config, self.records = engine, config, records
        self._stragglers = StragglerWatch(engine, config.straggler_factor)

    def at_start(self, run_dir: Path, values: dict[str, Any]) -> None:
        """Examine every rank's node and write RUN/health.json.

        Raises:
            UserError: ranks run different code, packages or configurations; or one is slow and ``health_check`` is
                stop.
        """
        if self.config.health_check == "off":
            return
        reports = node_health.examine(self.engine, run_dir, values)
        if self.engine.is_main:
            node_health.write(run_dir, reports)
        try:
            slow = node_health.check(reports)
        except UserError as error:
            self.records.event("unfit_node", reason=str(error))
            raise
        for reason in slow:
            self._tell("slow_node", reason=reason)
        if slow and self.config.health_check == "stop":
            raise UserError(
                "; ".join(slow) + "; take the node out, or set supervision.health_check=warn to train on it"
            )

    def due(self, step: int) -> bool:
        """Return whether ranks or copies of parameters are compared after ``step``."""
        intervals = (self.config.straggler_interval, self.config.replica_check_interval)
        return self.engine.world_size > 1 and any(self._due(step, interval) for interval in intervals)

    def after_step(self, step: int, own_s: float, step_s: float) -> None:
        """Note a step's times in seconds and do what is due.

        Args:
            step: the step that ended.
            own_s: time of this rank before the step's first collective.
            step_s: time of the step.

        Raises:
            UserError: copies of a parameter differ.
        """
        self._stragglers.note(own_s, step_s)
        if self._due(step, self.config.straggler_interval) and self.engine.world_size > 1:
            for slow in self._stragglers.compare():
                self._tell("slow_rank", step=step, **slow)
        if self._due(step, self.config.replica_check_interval) and self.engine.world_size > 1:
            different = find_differences(self.engine)
            if different:
                shown = "; ".join(different[:4]) + (f"; and {len(different) - 4} more" if len(different) > 4 else "")
                self.records.event("replica_mismatch", step=step, reason=shown, parameters=len(different))
                raise UserError(
                    f"step {step}: copies of a parameter are not equal any more: {shown}. A device computes wrongly, "
                    f"or its memory flipped a bit: take the node out and resume from a checkpoint before the last check"
                )

    def _tell(self, event: str, *, reason: str, **details: Any) -> None:
        self.records.event(event, reason=reason, **details)
        if self.engine.is_main:
            log.warning("%s", reason)

    @staticmethod
    def _due(step: int, interval: int) -> bool:
        return interval > 0 and step % interval == 0
