"""The training loop, top to bottom.

The loop knows an engine by its protocol, batches by their fields, and files by their functions; it does not know how
the model is laid out. Shape legend: L layers, B rows of a micro batch, S tokens of a row.
"""

from __future__ import annotations

import base64
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusiontree.checkpoint.config import CheckpointConfig
from fusiontree.checkpoint.folders import remove_partial
from fusiontree.checkpoint.load import check_model, load_newest
from fusiontree.checkpoint.saver import Saver
from fusiontree.data.batch import MicroBatch, StepBatch
from fusiontree.engines.base import Engine, StepInputs, StepResult
from fusiontree.training.branch_dropout import branch_scale
from fusiontree.training.checks import RunChecks
from fusiontree.training.config import LoggingConfig, TrainingConfig
from fusiontree.training.last_words import collect_reports, explain
from fusiontree.training.losses import GlobalCounts, LossWeights, loss_terms
from fusiontree.training.measurements import document_lengths, gate_statistics, peak_memory_gib
from fusiontree.training.progress import Progress, spoken
from fusiontree.training.records import Records, read_records
from fusiontree.training.restarts import count_starts
from fusiontree.training.schedule import learning_rate
from fusiontree.training.skips import check_skips, name_broken
from fusiontree.training.spikes import Rewinds, SpikeFilter
from fusiontree.training.stop import StopRequest
from fusiontree.training.watchdog import Watchdog, in_short
from fusiontree.utils.errors import UserError
from fusiontree.utils.flight_record import flight_record
from fusiontree.utils.reach import Peers, own_place

log = logging.getLogger(__name__)


class Outcome(Enum):
    """How a call of :meth:`Trainer.run` ended."""

    FINISHED = "finished"
    STOPPED = "stopped"
    """Saved and left at ``exit_at_step``."""
    INTERRUPTED = "interrupted"
    """Saved and left because a signal asked for it; a scheduler should start the run again."""


@dataclass(frozen=True)
class RunSettings:
    """The parts of the configuration the loop reads, and the whole of it as plain values for the checkpoint."""

    run_dir: Path
    training: TrainingConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    values: dict[str, Any]
    loss_weights: LossWeights
    num_layers: int
    drop_branch_prob: float
    flops_per_token: Callable[[list[int]], float]
    """Model FLOPs of training on one token, forward and backward, averaged over documents of these lengths."""
    peak_flops: float | None
    """Peak dense FLOP/s of one device at the run's precision, or None where it is not known."""
    extra_files: list[Path]
    """Small files that every checkpoint carries: the tokenizer."""


@dataclass
class Position:
    """Where the run stands; together with the engine's tensors, all that a resume needs."""

    step: int = 0
    tokens: int = 0
    """Tokens that were trained on: the labels of every step that was not skipped."""
    data: dict[str, Any] | None = None
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class StepDone:
    """What became of one step on this rank."""

    values: dict[str, Any]
    """Its metrics."""
    skipped: str | None
    """Why its gradient was not applied, or None."""
    spike: str | None
    """The same where the reason was the loss's height alone."""
    losses: list[Tensor]
    """This rank's own, one a micro batch; after the reduction every rank's is broken if one is."""
    stop: bool
    """All ranks agreed to stop after it."""
    arrived: float
    """When this rank came to the first collective, as ``time.perf_counter`` counts."""


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
        self.watchdog = Watchdog(settings.run_dir, engine.rank, engine.world_size, flight_record=flight_record)
        self.checks = RunChecks(engine, settings.training, self.records)
        self.spikes = SpikeFilter(settings.training)
        self.rewinds = Rewinds(settings.run_dir, settings.training.max_spikes)

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

    def _run(self, stop: StopRequest) -> Outcome:
        config, watch = self.settings.training, self.watchdog
        with watch.section("resume", config.slow_timeout_s):
            self._resume()
            self.saver.prepare(self.engine.state_tensors())
        if self.position.step >= config.max_steps:
            self._say(f"already finished: {self.settings.run_dir} is at step {self.position.step}")
            return Outcome.FINISHED
        run_dir, values = self.settings.run_dir, self.settings.values
        with watch.section("health check", config.slow_timeout_s):
            self.records.open_mirror(self.settings.logging.wandb, run_dir, values, self.position.step)
            self.checks.at_start(run_dir, values)
            watch.silent_hosts = Peers(self.engine.gather_text(own_place())).silent
        progress = Progress(config.max_steps)
        progress.mark(self.position.step)
        last_step = min(config.max_steps, config.exit_at_step or config.max_steps)
        interrupted, limit = False, config.slow_timeout_s
        batches = self.train_data.steps(self.position.data)
        while True:
            step = watch.step = self.position.step + 1
            began = time.perf_counter()
            with watch.section("wait for data", limit):
                batch, data_state = next(batches)
            with watch.section("step", limit):
                done = self._train_step(step, batch, stop.signal_name is not None, limit)
            if done.spike and config.spike_policy == "rewind" and self._rewind(step, data_state, done.spike):
                batches.close()
                batches, limit = self.train_data.steps(self.position.data), config.slow_timeout_s
                progress = Progress(config.max_steps)
                continue
            self._note_skip(step, done, batch)
            interrupted, limit = done.stop, config.hang_timeout_s
            seconds = time.perf_counter() - began
            self._train_seconds += seconds
            self.position.step, self.position.data = step, data_state
            progress.mark(step)
            values = done.values | self._speed(batch, seconds)
            if self._due(self.settings.logging.log_interval) or step == last_step:
                with watch.section("log", config.slow_timeout_s):
                    self.records.metrics(values)
                self._say(progress.line(values))
            with watch.section("checks", config.slow_timeout_s):
                self.checks.after_step(step, done.arrived - began, seconds)
            if self._due(config.eval_interval) or (config.eval_interval and step == config.max_steps):
                with watch.section("validate", config.slow_timeout_s):
                    self._validate()
            stopping = interrupted or step >= last_step
            if self._due(self.settings.checkpoint.save_interval) or stopping:
                with watch.section("save", config.slow_timeout_s):
                    self._save(wait=stopping)
            self._note_saves()
            if stopping:
                break
            if (moved := self.rewinds.data_after(step)) is not None:
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

    def _train_step(self, step: int, batch: StepBatch, stop_wanted: bool, limit: float) -> StepDone:
        """Do one optimizer step, or leave it out where its loss or gradient forbids it."""
        config, engine = self.settings.training, self.engine
        # Valid tokens of the whole window are counted before its first backward: every share has one denominator.
        tokens = sum(int((micro.labels_BS >= 0).sum()) for micro in batch.micro_batches)
        rows = sum(float(micro.row_weight_B.sum()) for micro in batch.micro_batches)
        # fp64 holds the sum of 32-bit hashes exactly. Ranks that share rows count them alike, each once; the wish to
        # stop may be any rank's own, and all must hear of it.
        values_of_rank = [float(stop_wanted), tokens, rows, batch.skipped_rows, batch.tokens_hash]
        local = torch.tensor(values_of_rank, dtype=torch.float64).to(engine.device)
        arrived = time.perf_counter()
        stop, *sums = engine.sum_over_ranks(local).tolist()
        sharing = engine.world_size // engine.dp_size
        all_tokens, all_rows, all_skipped, tokens_hash = (value / sharing for value in sums)
        counts = GlobalCounts(tokens=all_tokens, rows=all_rows)
        skipped_rows = int(all_skipped)
        self.train_data.count_skipped(skipped_rows)

        layers = self.settings.num_layers
        token_terms = torch.zeros(2, device=engine.device)  # lm, z
        row_terms = torch.zeros(2, device=engine.device)  # load balance, entropy
        losses: list[Tensor] = []
        gate_sums_3L = torch.zeros(3, layers, device=engine.device)  # of row means: gate, its square, its entropy
        for index, micro in enumerate(batch.micro_batches):
            with self.watchdog.section(f"forward of micro batch {index}", limit):
                out = engine.forward(self._inputs(micro, step))
            terms = loss_terms(
                out.loss_sum,
                out.z_sum,
                out.gate_sum_LB,
                out.entropy_sum_LB,
                out.count_B,
                out.row_weight_B,
                self.settings.loss_weights,
                counts,
            )
            with self.watchdog.section(f"backward of micro batch {index}", limit):
                engine.backward(terms.total, last=index == len(batch.micro_batches) - 1)
            losses.append(terms.lm.detach())
            token_terms += torch.stack([terms.lm.detach(), terms.z.detach()])
            row_terms += torch.stack([terms.load_balance.detach(), terms.entropy.detach()])
            share_B = out.row_weight_B / out.count_B.clamp(min=1)
            sums_3LB = torch.stack([out.gate_sum_LB, out.square_sum_LB, out.entropy_sum_LB]).detach()
            gate_sums_3L += (sums_3LB * share_B).sum(-1)
        rate = learning_rate(step, config)
        # Before the optimizer step: a spike must not get into the weights.
        lm, z = engine.sum_over_tokens(token_terms).tolist()
        spike = self._agree_on_spike(lm, batch.seq_len)
        with self.watchdog.section("optimizer step", limit):
            if spike:
                engine.discard()
                result = StepResult(math.nan, skipped=spike)
            else:
                result = engine.step(rate)
        if result.skipped is None:
            self.position.tokens += int(counts.tokens)
            self.spikes.accept(lm, batch.seq_len)

        reduced = engine.sum_over_rows(torch.cat([row_terms, gate_sums_3L.flatten()])).cpu()
        load_balance, entropy = reduced[:2].tolist()
        weights = self.settings.loss_weights
        total = lm + weights.z_loss * z + weights.load_balance * load_balance + weights.entropy * entropy
        values = {
            "step": step,
            "tokens": self.position.tokens,
            "loss": total,
            "lm_loss": lm,
            "load_balance_loss": load_balance,
            "entropy_loss": entropy,
            "z_loss": z,
            "grad_norm": result.grad_norm,
            "lr": rate,
            "seq_len": batch.seq_len,
            "skipped_rows": skipped_rows,
            "tokens_hash": f"{int(tokens_hash) & 0xFFFF_FFFF:08x}",
            "epochs": list(batch.epochs),
            "gates": gate_statistics(reduced[2:].view(3, layers) / max(counts.rows, 1.0)),
        }
        return StepDone(values, result.skipped, spike, losses, stop > 0, arrived)

    def _agree_on_spike(self, loss: float, seq_len: int) -> str | None:
        """Return what all ranks think of the loss; sums may differ in their last digit between ranks."""
        if self.settings.training.spike_policy == "off":
            return None
        mine = self.spikes.judge(loss, seq_len)
        anyone = self.engine.sum_over_ranks(torch.tensor([float(mine is not None)], device=self.engine.device))
        return (mine or "loss spike on another rank") if float(anyone) else None

    def _inputs(self, micro: MicroBatch, step: int | None) -> StepInputs:
        scale = None
        if step is not None:
            scale = branch_scale(
                micro.rows_B.tolist(),
                layers=self.settings.num_layers,
                probability=self.settings.drop_branch_prob,
                seed=self.settings.training.seed,
                step=step,
            )
        return StepInputs(micro.input_ids_BS, micro.labels_BS, micro.positions_BS, micro.row_weight_B, scale)

    def _note_skip(self, step: int, done: StepDone, batch: StepBatch) -> None:
        if done.skipped is None:
            self.position.skipped_in_a_row = 0
            return
        reason = done.skipped
        if not done.spike:  # all ranks skip together, so all are here
            named = name_broken(self.engine, self.train_data, batch, done.losses)
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
        with self.watchdog.section("rewind", self.settings.training.slow_timeout_s):
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

    def _speed(self, batch: StepBatch, seconds: float) -> dict[str, Any]:
        """Throughput of the step: all tokens of its rows count, as every one is computed."""
        config = self.settings.training
        tokens = config.global_batch_size * config.seq_len
        per_s = tokens / seconds
        per_gpu = per_s / self.engine.world_size
        peak = self.settings.peak_flops
        return {
            "tokens_per_s": per_s,
            "tokens_per_s_per_gpu": per_gpu,
            "mfu": per_gpu * self.settings.flops_per_token(document_lengths(batch)) / peak if peak else None,
            "step_time_s": seconds,
            "data_wait_s": batch.wait_s,
            "peak_memory_gib": peak_memory_gib(self.engine.device),
        }

    def _validate(self) -> None:
        if self.validation_data is None:
            return
        sums = torch.zeros(2, dtype=torch.float64)
        for micro in self.validation_data.micro_batches():
            sums[0] += self.engine.evaluate(self._inputs(micro, step=None)).double().cpu()
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
        """Fill the engine's tensors from the newest good checkpoint; return its folder and small values."""
        return load_newest(
            self.saver.checkpoints,
            self.engine.state_tensors(),
            group=self.saver.group,
            check=lambda folder, state: check_model(folder, state, self.settings.values["model"]),
            on_damage=self._report_damage,
            report=spoken(self._say, "reading and verifying the checkpoint"),
        )

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
