"""The training loop.

The loop does not know how the model is sharded. step.py implements one step; pipeline.py queues steps on the device and
reads their results one step later.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from fusiontree.checkpoint.saver import Saver
from fusiontree.data.loader import TrainingData
from fusiontree.data.state import differences
from fusiontree.data.validation import ValidationData
from fusiontree.engines.base import Engine
from fusiontree.supervision.restart_policy import count_starts
from fusiontree.supervision.signals import StopRequest
from fusiontree.supervision.watchdog import Watchdog, summarize_error
from fusiontree.tracking.console import NOTICE, Console
from fusiontree.tracking.crash_report import collect_reports, explain
from fusiontree.tracking.records import Records, read_records
from fusiontree.training.checkpoints import RunCheckpoints
from fusiontree.training.lost_checkpoints import check_nothing_lost
from fusiontree.training.nonfinite import check_skips
from fusiontree.training.observers import Observer
from fusiontree.training.pipeline import BatchStream, FinishedStep, StepPipeline
from fusiontree.training.settings import RunSettings
from fusiontree.training.spikes import Rewinds, SpikeFilter
from fusiontree.training.step import TrainStep
from fusiontree.training.validation import Validation
from fusiontree.utils import gc_control
from fusiontree.utils.errors import UserError


class Outcome(Enum):
    """How a call of :meth:`Trainer.run` ended."""

    FINISHED = "finished"
    STOPPED = "stopped"
    """Saved and left at ``exit_at_step``."""
    INTERRUPTED = "interrupted"
    """Saved and left because a signal asked for it; a scheduler should start the run again."""


@dataclass
class Position:
    """The last step that was queued, and where the data continues after it."""

    step: int = 0
    data: dict[str, Any] | None = None
    skipped_in_a_row: int = 0
    """Consecutive steps up to this one that were skipped for a non-finite gradient."""


class Trainer:
    """Trains from the newest checkpoint of the run folder to ``max_steps``."""

    def __init__(
        self,
        settings: RunSettings,
        engine: Engine,
        train_data: TrainingData,
        validation_data: dict[str, ValidationData],
        saver: Saver,
        records: Records,
        watchdog: Watchdog,
        console: Console,
        observers: Sequence[Observer],
    ) -> None:
        """Connect the parts of a run; nothing is read or written before :meth:`run`.

        Args:
            settings: the run's configuration.
            engine: executes steps.
            train_data: yields the training batches.
            validation_data: the held-out datasets by name; the loss on the first is the run's validation loss.
            saver: writes the checkpoints.
            records: takes metrics and events.
            watchdog: ends the process if it hangs.
            console: shows messages and validations.
            observers: see every finished step, in this order.
        """
        self.settings, self.engine = settings, engine
        self.saver, self.records, self.watchdog = saver, records, watchdog
        self.console, self.observers = console, observers
        self.position = Position()
        self.batches = BatchStream(train_data)
        self.spikes = SpikeFilter(settings.training.spikes)
        self.rewinds = Rewinds(settings.run_dir, settings.training.spikes.max_in_a_row)
        self.checkpoints = RunCheckpoints(saver, engine, records, settings.values)
        step = TrainStep(settings, engine, train_data, watchdog, self.spikes)
        self.pipeline = StepPipeline(step, engine, train_data, watchdog, self.spikes, self.batches.next)
        self.validation = Validation(engine, validation_data, records, console)
        self._order = train_data.order
        self._train_seconds = 0.0
        self._section_timeout_s = settings.limits.slow_s

    def run(self) -> Outcome:
        """Resume if there is a checkpoint, train, validate, save; return how it ended.

        Raises:
            UserError: too many consecutive steps were skipped, data or checkpoint do not match the configuration, or
                ranks have different values where all must be equal.
        """
        try:
            with self.watchdog, StopRequest() as stop:
                return self._run(stop)
        except BaseException as error:
            self.checkpoints.wait_for_last_save(patience_s=60)
            self._end("failed", summarize_error(error))
            raise
        finally:
            gc_control.unfreeze()

    def _run(self, stop: StopRequest) -> Outcome:
        with self.watchdog.section("resume", self._section_timeout_s):
            self._resume()
            self.saver.prepare(self.engine.state_tensors())
        max_steps = self.settings.training.max_steps
        if self.position.step >= max_steps:
            outcome, reason = Outcome.FINISHED, "already finished"
        else:
            with self.watchdog.section("health check", self._section_timeout_s):
                for observer in self.observers:
                    observer.on_start(self.position.step)
            outcome, reason = self._train(stop)
            if self.checkpoints.saved_step != self.position.step and outcome is not Outcome.INTERRUPTED:
                raise UserError(
                    f"{reason}, but the last checkpoint could not be written (see save_failed in events.jsonl); fix "
                    f"the cause and run the same command again: it resumes from the newest complete checkpoint"
                )
        self._end(outcome.value, reason)
        where = f"at step {self.position.step}/{max_steps}; everything is in {self.settings.run_dir}"
        self.console.say(f"{reason} {where}", NOTICE)
        return outcome

    def _train(self, stop: StopRequest) -> tuple[Outcome, str]:
        """Execute steps until the last one or a stop signal; return how they ended and why."""
        limit_s, is_first = self._section_timeout_s, True  # the first step compiles kernels: allow it more time
        self.batches.seek(self.position.data)
        while True:
            step = self.watchdog.step = self.position.step + 1
            self._process(self.pipeline.submit(step, stop_wanted=stop.requested, limit_s=limit_s))
            queued = self.pipeline.queued
            if queued.spike and self.settings.training.spikes.policy == "rewind" and self._rewind(step, queued.spike):
                limit_s = self._section_timeout_s
                continue
            self.position.step, self.position.data = step, self.batches.position
            is_last = queued.stop or step >= self.settings.last_step
            is_saved = is_last or _due(step, self.settings.config.checkpoint.save_interval)
            is_validated = self._validation_due(step)
            if is_first or is_saved or is_validated or any(o.needs_finished_step(step) for o in self.observers):
                with self.watchdog.section("end of the step", limit_s):
                    finished = self.pipeline.drain()
                self._process(finished)
            if is_first:
                gc_control.freeze()
            limit_s, is_first = self.settings.limits.step_s, False
            if is_validated:
                with self.watchdog.section("validate", self._section_timeout_s):
                    self.validation.run(step, self.pipeline.tokens)
            if is_saved:
                self._save(wait=is_last)
            self.checkpoints.report()
            if is_last:
                return self._outcome(queued.stop, stop)
            self._apply_recorded_rewind(step)

    def _outcome(self, interrupted: bool, stop: StopRequest) -> tuple[Outcome, str]:
        if self.position.step >= self.settings.training.max_steps:
            return Outcome.FINISHED, "finished"
        if interrupted:
            return Outcome.INTERRUPTED, f"stopped by {stop.signal_name or 'a signal on another rank'}"
        return Outcome.STOPPED, "stopped at training.exit_at_step"

    def _process(self, step: FinishedStep | None) -> None:
        """Count a finished step and show it to the observers.

        Raises:
            UserError: too many steps in a row were skipped, or an observer found a fault.
        """
        if step is None:
            return
        self._train_seconds += step.host_s
        if step.skipped is None:
            self.position.skipped_in_a_row = 0
        else:
            self._count_skip(step, step.skipped)
        for observer in self.observers:
            observer.after_step(step)

    def _count_skip(self, step: FinishedStep, reason: str) -> None:
        self.records.event("step_skipped", step=step.number, reason=reason)
        self.console.say(f"step {step.number} skipped: {reason}")
        if step.is_spike:
            self.spikes.count_skip(step.number, reason)
        else:
            self.position.skipped_in_a_row += 1
            check_skips(step.number, self.position.skipped_in_a_row, reason, self.settings.training)

    def _rewind(self, step: int, reason: str) -> bool:
        """Load the newest checkpoint and continue with the data after ``step``; return False if there is none."""
        data_after = self.batches.position
        assert data_after is not None
        with self.watchdog.section("rewind", self._section_timeout_s):
            self.checkpoints.wait()
            found = self.checkpoints.load_newest()
            if found is None:
                return False
            self.pipeline.forget()
            back = found[1]["step"]
            # Step number and schedules return to the checkpoint's; only the position in the data does not.
            rewinds = self.rewinds.plan(step, back, data_after | {"step": back}, reason)
            if self.engine.is_main:
                self.rewinds.write(rewinds)
            self.engine.barrier()
            self._load_state_dict(found[1])
            self._train_seconds = self.checkpoints.train_seconds
        self.batches.seek(self.position.data)
        for observer in self.observers:
            observer.on_rewind(back)
        self.records.event("rewind", step=step, to_step=back, reason=reason, data=self.position.data)
        self.console.say(f"step {step}: {reason}; back to step {back}, continuing with the data after it")
        return True

    def _apply_recorded_rewind(self, step: int) -> None:
        """If an earlier launch rewound to ``step``, continue with the data that it continued with."""
        data = self.rewinds.data_after(step)
        if data is not None:
            self._process(self.pipeline.drain())  # before seek: train_data describes only recent rows
            self.position.data = data
            self.batches.seek(data)

    def _validation_due(self, step: int) -> bool:
        interval = self.settings.training.validation.interval
        return _due(step, interval) or (interval > 0 and step == self.settings.training.max_steps)

    def _save(self, *, wait: bool) -> None:
        with self.watchdog.section("save", self._section_timeout_s):
            values, files = self._state_dict(), self.settings.extra_files
            self.checkpoints.save(self.position.step, values, files, self._train_seconds, wait=wait)

    def _resume(self) -> None:
        starts = 0
        if self.engine.is_main:
            if loss := check_nothing_lost(self.settings.run_dir, self.settings.config.checkpoint):
                self.records.event("checkpoints_lost", reason=loss)
            starts = count_starts(read_records(self.records.events_path))
            self.checkpoints.remove_partial()
            if reports := collect_reports(self.settings.run_dir):
                kind = "hang" if any(report["kind"] == "hang" for report in reports) else "crash"
                self.records.event(kind, reason=explain(reports), ranks=reports)
        self.engine.barrier()
        found = self.checkpoints.load_newest()
        origin: dict[str, Any] = {
            "world_size": self.engine.world_size,
            "restarts": starts,
            "data": self._order.fingerprint,
        }
        if found is None:
            self._discard_metrics(0)
            self.rewinds.restore(0)
            if initial := self.settings.initial:
                self.checkpoints.load_initial(initial)
                origin["init_from"] = initial.record()
                self.console.say(str(initial), NOTICE)
            self.records.event("start", step=0, **origin)
            return
        folder, state = found
        self._load_state_dict(state)
        self.records.event("resume", step=self.position.step, folder=folder.name, **origin)
        self.console.say(f"resumed at step {self.position.step} from {folder}")
        if (saved := self.position.data) and saved["fingerprint"] != self._order.fingerprint:
            changes = differences(saved, self._order)
            self.records.event("mixture_changed", step=self.position.step, row=saved["row"], changes=changes)
            self.console.say(f"the mixture changes after step {self.position.step}: {'; '.join(changes)}", NOTICE)

    def _discard_metrics(self, step: int) -> None:
        """Move the metrics of steps after ``step`` aside and say which steps are computed again."""
        last = self.records.truncate_metrics(step)
        if last > step:
            self.console.say(f"steps {step + 1} to {last} were computed before and are computed again", NOTICE)

    def _state_dict(self) -> dict[str, Any]:
        """Return the small values of a checkpoint: everything that a resume needs except the engine's tensors."""
        values = {
            "config": self.settings.values,
            "tokens": self.pipeline.tokens,
            "data": self.position.data,
            "skipped_in_a_row": self.position.skipped_in_a_row,
            "spikes": self.spikes.state_dict(),
            "rewinds": self.rewinds.applied,
            "engine": self.engine.state_dict(),
            "rng": {"torch_cpu": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()},
        }
        if self.validation.last is not None and self.validation.last[0] == self.position.step:
            values["validation_loss"] = self.validation.last[1]
        return values

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the values of :meth:`_state_dict`; move metrics of later steps out of the metrics file."""
        self.engine.load_state_dict(state["engine"])
        rng = torch.frombuffer(bytearray(base64.b64decode(state["rng"]["torch_cpu"])), dtype=torch.uint8)
        torch.set_rng_state(rng)  # no code of ours draws from it; a plugin's mixer or optimizer may
        self.position = Position(state["step"], state["data"], state["skipped_in_a_row"])
        self.pipeline.tokens = state["tokens"]
        self.spikes.load_state_dict(state.get("spikes"))
        self.rewinds.restore(state.get("rewinds", 0))
        self.position.data = self.rewinds.data_after(self.position.step) or self.position.data
        self._discard_metrics(self.position.step)

    def _end(self, outcome: str, reason: str) -> None:
        for observer in self.observers:
            observer.on_end(self.position.step, outcome, reason)


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
