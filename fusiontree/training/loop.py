"""The training loop, top to bottom.

The loop knows an engine by its protocol, batches by their fields, and files by their functions; it does not know how
the model is laid out. What happens in a step is in step.py.
"""

from __future__ import annotations

import base64
import logging
import math
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from fusiontree.checkpoint.folders import complete_checkpoints, remove_partial, set_aside
from fusiontree.checkpoint.load import check_model, load_newest
from fusiontree.checkpoint.saver import Saver
from fusiontree.engines.base import Engine
from fusiontree.optim.config import check_same_optimizer
from fusiontree.supervision.monitors import RunMonitors
from fusiontree.supervision.restart_policy import count_starts
from fusiontree.supervision.signals import StopRequest
from fusiontree.supervision.watchdog import Watchdog, in_short
from fusiontree.tracking.console import Progress, spoken
from fusiontree.tracking.crash_report import collect_reports, explain
from fusiontree.tracking.records import Records, read_records
from fusiontree.training.nonfinite import check_skips, name_nonfinite
from fusiontree.training.settings import RunSettings
from fusiontree.training.spikes import Rewinds, SpikeFilter
from fusiontree.training.step import PendingStep, TrainStep, step_inputs
from fusiontree.utils import gc_control
from fusiontree.utils.device import Mark
from fusiontree.utils.errors import UserError
from fusiontree.utils.flight_record import flight_record
from fusiontree.utils.peers import Peers, host_address

log = logging.getLogger(__name__)


class Outcome(Enum):
    """How a call of :meth:`Trainer.run` ended."""

    FINISHED = "finished"
    STOPPED = "stopped"
    """Saved and left at ``exit_at_step``."""
    INTERRUPTED = "interrupted"
    """Saved and left because a signal asked for it; a scheduler should start the run again."""


@dataclass
class Position:
    """Where the run stands; together with the engine's tensors, all that a resume needs."""

    step: int = 0
    tokens: int = 0
    """Tokens that were trained on: the labels of every step that was not skipped."""
    data: dict[str, Any] | None = None
    skipped_in_a_row: int = 0


class Trainer:
    """Trains from wherever the run folder stands to ``max_steps``."""

    def __init__(
        self, settings: RunSettings, engine: Engine, train_data: Any, validation_data: Any | None, saver: Saver
    ) -> None:
        """Wire up; nothing is read or written before :meth:`run`.

        Args:
            settings: what the configuration says.
            engine: executes steps.
            train_data: yields ``(StepBatch, state)`` from a state.
            validation_data: yields micro batches of the held-out split, the same at every validation; or None.
            saver: writes the checkpoints.
        """
        self.settings = settings
        self.engine = engine
        self.train_data = train_data
        self.validation_data = validation_data
        self.records = Records(settings.run_dir, enabled=engine.is_main)
        self.position = Position()
        self.saver = saver
        self._saved_step: int | None = None
        self._validated: tuple[int, float] = (-1, math.nan)
        self._train_seconds = 0.0
        self._saved_train_seconds = 0.0
        self._pending: tuple[PendingStep, Mark] | None = None  # the last step, and when the device began it
        self.watchdog = Watchdog(settings.run_dir, engine.rank, engine.world_size, flight_record=flight_record)
        self.checks = RunMonitors(engine, settings.supervision, self.records)
        self.spikes = SpikeFilter(settings.training.spikes)
        self.step = TrainStep(settings, engine, train_data, self.watchdog, self.spikes)
        self.rewinds = Rewinds(settings.run_dir, settings.training.spikes.max_in_a_row)
        self.progress = Progress(settings.training.max_steps)
        self._last_step = min(
            settings.training.max_steps, settings.training.exit_at_step or settings.training.max_steps
        )

    def run(self) -> Outcome:
        """Resume if there is a checkpoint, train, validate, save; return how it ended.

        Raises:
            UserError: too many steps in a row had to be skipped, data or checkpoint do not fit the run, or ranks
                differ in what must be equal.
        """
        try:
            with self.watchdog, StopRequest() as stop:
                return self._run(stop)
        except BaseException as error:
            self.saver.wait(patience_s=60)  # what is half written may be all that is left of the last hours
            self._note_saves(ending=True)
            self.records.event("failed", step=self.position.step, reason=in_short(error))
            self.records.close(patience_s=10)
            raise
        finally:
            gc_control.unfreeze()

    def _run(self, stop: StopRequest) -> Outcome:
        config, limits, watch = self.settings.training, self.settings.supervision, self.watchdog
        with watch.section("resume", limits.slow_timeout_s):
            self._resume()
            self.saver.prepare(self.engine.state_tensors())
        if self.position.step >= config.max_steps:
            why = f"already finished: {self.settings.run_dir} is at step {self.position.step}"
            self.records.event(Outcome.FINISHED.value, step=self.position.step, reason=why)  # this start did not fail
            self.records.close()
            self._say(why)
            return Outcome.FINISHED
        run_dir, values = self.settings.run_dir, self.settings.values
        with watch.section("health check", limits.slow_timeout_s):
            self.records.open_trackers(self.settings.logging, run_dir, values, self.position.step)
            self.checks.at_start(run_dir, values)
            watch.silent_hosts = Peers(self.engine.gather_text(host_address())).silent
        self.progress.mark(self.position.step)
        interrupted, settled, limit = False, False, limits.slow_timeout_s
        batches = self.train_data.steps(self.position.data)
        while True:
            step = watch.step = self.position.step + 1
            began = time.perf_counter()
            # A step lasts from the end of the one before, which the device may still be at work on.
            start = self._pending[0].ended if self._pending else Mark(self.engine.device)
            with watch.section("wait for data", limit):
                batch, data_state = next(batches)
            with watch.section("step", limit):
                wanted = stop.signal_name is not None
                done = self.step.run(step, batch, stop_wanted=wanted, limit=limit, overlap_work=self._read_step)
            if done.spike and config.spikes.policy == "rewind" and self._rewind(step, data_state, done.spike):
                batches.close()
                batches, limit = self.train_data.steps(self.position.data), limits.slow_timeout_s
                self.progress = Progress(config.max_steps)
                continue
            if not settled:  # the first step is over, in which kernels were compiled
                gc_control.freeze()
            self.position.step, self.position.data = step, data_state
            interrupted = done.stop
            stopping = interrupted or step >= self._last_step
            saving = self._due(self.settings.checkpoint.save_interval) or stopping
            validating = self._due(config.validation.interval) or (
                config.validation.interval and step == config.max_steps
            )
            pausing = saving or validating or not settled  # otherwise the device goes on while the step is read
            if pausing:
                with watch.section("end of the step", limit):
                    done.wait()
            seconds = time.perf_counter() - began
            self._train_seconds += seconds
            self.progress.mark(step)
            self._pending = (done, start)
            if pausing:
                self._read_step()
            settled, limit = True, limits.hang_timeout_s
            with watch.section("checks", limits.slow_timeout_s):
                self.checks.after_step(step, done.reached_collective_at - began, seconds)
            if validating:
                with watch.section("validate", limits.slow_timeout_s):
                    self._validate()
            if saving:
                with watch.section("save", limits.slow_timeout_s):
                    self._save(wait=stopping)
            self._note_saves()
            if stopping:
                break
            if (moved := self.rewinds.data_after(step)) is not None:
                self._read_step()  # the data knows where its rows came from until other data begins
                self.position.data = moved
                batches.close()
                batches = self.train_data.steps(moved)
        if self.position.step >= config.max_steps:
            outcome, why = Outcome.FINISHED, "finished"
        elif interrupted:
            outcome, why = Outcome.INTERRUPTED, f"stopped by {stop.signal_name or 'a signal on another rank'}"
        else:
            outcome, why = Outcome.STOPPED, "stopped at training.exit_at_step"
        if self._saved_step != self.position.step and outcome is not Outcome.INTERRUPTED:
            raise UserError(
                f"{why}, but the last checkpoint could not be written (the event save_failed says why); mend that and "
                f"start the same command again: it resumes from the newest checkpoint there is"
            )
        self.records.event(outcome.value, step=self.position.step, reason=why)
        self.records.close(patience_s=60 if outcome is Outcome.FINISHED else 10)
        self._say(f"{why} at step {self.position.step}/{config.max_steps}; everything is in {self.settings.run_dir}")
        return outcome

    def _read_step(self) -> None:
        """Read what became of the last step, as soon as the device is done with it, and write it down.

        All ranks do so at the same place.

        Raises:
            UserError: too many steps in a row had to be left out.
        """
        if self._pending is None:
            return
        (done, start), self._pending = self._pending, None
        step = done.number
        if done.result.skipped is None:
            self.position.tokens += done.counts().tokens
            self.position.skipped_in_a_row = 0
            self.spikes.accept(done.token_sums().lm, done.batch.seq_len)
        else:
            self._note_skip(done, done.result.skipped)
        interval = self.settings.logging.log_interval
        if (interval and step % interval == 0) or step == self._last_step:
            with self.watchdog.section("log", self.settings.supervision.slow_timeout_s):
                values = self.step.values(done, self.position.tokens)
                values |= self.step.speed(done.batch, done.ended.seconds_since(start))
                self.records.metrics(values)
            self._say(self.progress.line(values))

    def _note_skip(self, done: PendingStep, reason: str) -> None:
        step = done.number
        if not done.spike:  # all ranks skip together, so all are here
            named = name_nonfinite(self.engine, self.train_data, done.batch, done.losses)
            reason += f"; {named}" if named else ""
        self.records.event("step_skipped", step=step, reason=reason)
        self._say(f"step {step} skipped: {reason}")
        if done.spike:
            self.spikes.count_skip(step, reason)
        else:
            self.position.skipped_in_a_row += 1
            check_skips(step, self.position.skipped_in_a_row, reason, self.settings.training)

    def _rewind(self, step: int, data_after: dict[str, Any], reason: str) -> bool:
        """Go back to the newest checkpoint, and on with the data behind ``step``; False where there is none."""
        with self.watchdog.section("rewind", self.settings.supervision.slow_timeout_s):
            self.saver.wait()
            self._note_saves()
            found = self._load_newest()
            if found is None:
                return False
            back = found[1]["step"]
            # Only the position in the data moves on: step and schedule are the checkpoint's.
            rewinds = self.rewinds.plan(step, back, data_after | {"step": back}, reason)
            if self.engine.is_main:
                self.rewinds.write(rewinds)
            self.engine.barrier()
            self._take_up(found[1])
            self._train_seconds = self._saved_train_seconds
        self.records.event("rewind", step=step, to_step=back, reason=reason, data=self.position.data)
        self._say(f"step {step}: {reason}; back to step {back}, and on with the data behind it")
        return True

    def _validate(self) -> None:
        if self.validation_data is None:
            return
        sums = torch.zeros(2, dtype=torch.float64)
        for micro in self.validation_data.micro_batches():
            sums[0] += self.engine.evaluate(step_inputs(micro, self.settings, step=None)).double().cpu()
            sums[1] += (micro.labels_BS >= 0).sum()
        on_device = sums.to(self.engine.device)
        loss_sum = float(self.engine.sum_over_tokens(on_device[:1].clone()))
        tokens = float(self.engine.sum_over_rows(on_device[1:].clone()))
        loss = loss_sum / max(tokens, 1.0)
        step = self.position.step
        self._validated = (step, loss)
        self.records.metrics({"step": step, "tokens": self.position.tokens, "validation_loss": loss})
        self._say(f"step {step}/{self.settings.training.max_steps}  validation loss {loss:.4f} on {int(tokens)} tokens")

    def _save(self, wait: bool) -> None:
        """Save this step, in the background unless ``wait``."""
        self.saver.wait()
        self._note_saves()
        if self._saved_step == self.position.step:
            return
        values = {
            "config": self.settings.values,
            "tokens": self.position.tokens,
            "data": self.position.data,
            "skipped_in_a_row": self.position.skipped_in_a_row,
            "spikes": self.spikes.to_dict(),
            "rewinds": self.rewinds.done,
            "engine": self.engine.state_values(),
            "rng": {"torch_cpu": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()},
        }
        if self._validated[0] == self.position.step:
            values["validation_loss"] = self._validated[1]
        tensors, files = self.engine.state_tensors(), self.settings.extra_files
        self.saver.save(
            self.position.step, tensors, values, files, wait=wait, note={"train_seconds": round(self._train_seconds, 3)}
        )
        self._saved_step = self.position.step
        if wait:
            self._note_saves()

    def _note_saves(self, ending: bool = False) -> None:
        """Write down what became of saves since the last call."""
        for result in self.saver.poll():
            if result.error:
                self._saved_step = None if self._saved_step == result.step else self._saved_step
                self.records.event("save_failed", step=result.step, reason=result.error)
                if self.engine.is_main:
                    log.error("step %d was NOT saved: %s", result.step, result.error)
                if result.fatal and not ending:
                    raise UserError(result.error)
                continue
            self._saved_train_seconds = result.note["train_seconds"]
            self.records.event(
                "save",
                step=result.step,
                folder=result.folder.name,
                seconds=round(result.stall_s, 3),
                write_seconds=round(result.write_s, 3),
                bytes=result.size,
                removed=result.removed,
                train_seconds=result.note["train_seconds"],
            )
            self._say(
                f"saved {result.folder} ({result.size / 1e9:.2f} GB in {result.write_s:.1f} s; training waited "
                f"{result.stall_s:.2f} s)"
            )

    def _resume(self) -> None:
        starts = 0
        if self.engine.is_main:
            starts = count_starts(read_records(self.records.events_path))
            for partial in remove_partial(self.saver.checkpoints):
                self.records.event("partial_checkpoint_removed", folder=partial.name)
            if reports := collect_reports(self.settings.run_dir):
                kind = "hang" if any(report["kind"] == "hang" for report in reports) else "crash"
                self.records.event(kind, reason=explain(reports), ranks=reports)
        self.engine.barrier()
        found = self._load_newest()
        if found is None:
            self.records.truncate_metrics(0)
            self.rewinds.load(0)
            self.records.event("start", step=0, world_size=self.engine.world_size, restarts=starts)
            return
        folder, state = found
        self._take_up(state)
        self.records.event(
            "resume",
            step=self.position.step,
            folder=folder.name,
            world_size=self.engine.world_size,
            restarts=starts,
        )
        self._say(f"resumed at step {self.position.step} from {folder}")

    def _load_newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Fill the engine's tensors from the newest good checkpoint; return its folder and small values.

        Damaged newer checkpoints are renamed: they belong to no history from here on, and a later save of the same step
        must not replace them.
        """
        found = load_newest(
            self.saver.checkpoints,
            self.engine.state_tensors(),
            group=self.saver.group,
            check=self._check_checkpoint,
            on_damage=self._report_damage,
            report=spoken(self._say, "reading and verifying the checkpoint"),
        )
        if found is not None and self.engine.is_main:
            for folder in complete_checkpoints(self.saver.checkpoints):
                if folder > found[0]:
                    self._set_aside(folder)
        self.engine.barrier()
        return found

    def _check_checkpoint(self, folder: Path, state: dict[str, Any]) -> None:
        check_model(folder, state, self.settings.values["model"])
        check_same_optimizer(folder, state.get("config", {}), self.settings.training.optimizer.name)

    def _set_aside(self, folder: Path) -> None:
        try:
            aside = set_aside(folder)
        except OSError as error:
            log.warning("damaged checkpoint %s cannot be renamed: %s", folder, error)
            return
        self.records.event("checkpoint_set_aside", folder=folder.name, renamed=aside.name)
        log.warning("damaged checkpoint %s is now %s; it can be deleted", folder, aside.name)

    def _report_damage(self, message: str) -> None:
        self.records.event("checkpoint_damaged", reason=message)
        if self.engine.is_main:
            log.warning(message)

    def _take_up(self, state: dict[str, Any]) -> None:
        """Make a checkpoint's small values the state of the run; metrics of later steps are moved aside."""
        self.engine.load_state_values(state["engine"])
        rng = torch.frombuffer(bytearray(base64.b64decode(state["rng"]["torch_cpu"])), dtype=torch.uint8)
        torch.set_rng_state(rng)
        self.position = Position(state["step"], state["tokens"], state["data"], state["skipped_in_a_row"])
        self.spikes.load(state.get("spikes"))
        self.rewinds.load(state.get("rewinds", 0))
        self.position.data = self.rewinds.data_after(self.position.step) or self.position.data
        self._saved_step = self.position.step
        self.records.truncate_metrics(self.position.step)

    def _due(self, interval: int) -> bool:
        return interval > 0 and self.position.step % interval == 0

    def _say(self, message: str) -> None:
        if self.engine.is_main:
            log.info(message)
