"""Observers of a run: they see every finished step and change nothing that training does."""

from __future__ import annotations

from fusiontree.engines.base import Engine
from fusiontree.supervision.monitors import RunMonitors
from fusiontree.supervision.watchdog import Watchdog
from fusiontree.tracking.console import Console
from fusiontree.tracking.records import Records
from fusiontree.training.metrics import Interval, step_metrics
from fusiontree.training.pipeline import FinishedStep
from fusiontree.training.settings import RunSettings
from fusiontree.utils.peers import Peers, host_address


class Observer:
    """Base of all observers; its methods do nothing. All ranks call each method together."""

    def on_start(self, step: int) -> None:
        """Prepare; the run continues after ``step``."""

    def needs_finished_step(self, step: int) -> bool:
        """Return True to drain the pipeline after ``step``, because :meth:`after_step` reads parameters.

        The device then waits while the host prepares the next step.
        """
        return False

    def on_rewind(self, step: int) -> None:
        """Note that the run returned to the checkpoint of ``step`` and continues after it."""

    def after_step(self, step: FinishedStep) -> None:
        """Look at a finished step. Unless the pipeline was drained, the next step is queued on the device.

        Raises:
            UserError: the run must not go on.
        """

    def on_end(self, step: int, outcome: str, reason: str) -> None:
        """Close what is open.

        Args:
            step: the last step.
            outcome: finished, stopped, interrupted or failed.
            reason: one sentence.
        """


class PeerWatch(Observer):
    """Tells the watchdog which hosts of the job do not answer any more."""

    def __init__(self, engine: Engine, watchdog: Watchdog) -> None:
        """Connect to nothing yet."""
        self._engine, self._watchdog = engine, watchdog

    def on_start(self, step: int) -> None:
        """Learn the hosts of all ranks."""
        self._watchdog.silent_hosts = Peers(self._engine.gather_text(host_address())).silent


class HealthMonitor(Observer):
    """Checks nodes at the start, and ranks' speed and copies of parameters at intervals."""

    def __init__(self, engine: Engine, settings: RunSettings, records: Records, watchdog: Watchdog) -> None:
        """Measure nothing yet."""
        self._settings, self._watchdog = settings, watchdog
        self._monitors = RunMonitors(engine, settings.config.supervision, records)

    def on_start(self, step: int) -> None:
        """Examine every rank's node."""
        self._monitors.at_start(self._settings.run_dir, self._settings.values)

    def needs_finished_step(self, step: int) -> bool:
        """Return True where ranks or copies of parameters are compared."""
        return self._monitors.due(step)

    def after_step(self, step: FinishedStep) -> None:
        """Note the rank's times and compare ranks where it is due."""
        with self._watchdog.section("checks", self._settings.limits.slow_s):
            self._monitors.after_step(step.number, step.own_s, step.host_s)


class StepLog(Observer):
    """Shows every step on the console and writes the metrics of logged steps to the run's records."""

    def __init__(
        self, engine: Engine, settings: RunSettings, records: Records, watchdog: Watchdog, console: Console
    ) -> None:
        """Write nothing yet."""
        self._engine, self._settings, self._records, self._watchdog = engine, settings, records, watchdog
        self._console = console
        self._interval = Interval()

    def on_start(self, step: int) -> None:
        """Open the experiment trackers."""
        settings = self._settings
        self._records.open_trackers(settings.config.logging, settings.run_dir, settings.values, step)
        self._console.start(step)

    def on_rewind(self, step: int) -> None:
        """Set the progress back."""
        self._interval.clear()
        self._console.start(step)

    def after_step(self, step: FinishedStep) -> None:
        """Show the step, and write its metrics if it is logged."""
        loss = step.token_sums.lm if step.skipped is None else None
        self._console.after_step(step.number, loss, step.tokens, list(step.batch.epochs))
        self._interval.add(step)
        if not self._settings.is_logged(step.number):
            return
        with self._watchdog.section("log", self._settings.limits.slow_s):
            values = step_metrics(step, self._settings, self._engine.world_size, self._engine.device, self._interval)
            self._records.metrics(values)
        self._interval.clear()
        self._console.logged(values)

    def on_end(self, step: int, outcome: str, reason: str) -> None:
        """Write how the run ended; close trackers and progress bar."""
        self._records.event(outcome, step=step, reason=reason)
        self._records.close(patience_s=60 if outcome == "finished" else 10)
        self._console.close()
