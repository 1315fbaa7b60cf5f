"""The training loop, top to bottom.

The loop knows an engine by its protocol, batches by their fields, and files by their functions; it does not know how
the model is laid out. Shape legend: L layers, B rows of a micro batch, S tokens of a row.
"""

from __future__ import annotations

import base64
import logging
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusiontree.checkpoint.config import CheckpointConfig
from fusiontree.checkpoint.folders import remove_old, remove_partial
from fusiontree.checkpoint.load import load_tensors, newest_good, read_state
from fusiontree.checkpoint.save import save_checkpoint
from fusiontree.data.batch import MicroBatch, StepBatch
from fusiontree.engines.base import Engine, StepInputs, StepResult
from fusiontree.training.branch_dropout import branch_scale
from fusiontree.training.config import LoggingConfig, TrainingConfig
from fusiontree.training.losses import GlobalCounts, LossWeights, loss_terms
from fusiontree.training.progress import Progress
from fusiontree.training.records import Records
from fusiontree.training.schedule import learning_rate
from fusiontree.training.stop import StopRequest
from fusiontree.training.watchdog import Watchdog, collect_hangs
from fusiontree.utils.errors import UserError

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


class Trainer:
    """Trains from wherever the run folder stands to ``max_steps``."""

    def __init__(self, settings: RunSettings, engine: Engine, train_data: Any, validation_data: Any | None) -> None:
        """Wire up; nothing is read or written before :meth:`run`.

        Args:
            settings: what the configuration says.
            engine: executes steps.
            train_data: yields ``(StepBatch, state)`` from a state.
            validation_data: yields micro batches of the held-out split, the same at every validation; or None.
        """
        self.settings = settings
        self.engine = engine
        self.train_data = train_data
        self.validation_data = validation_data
        self.records = Records(settings.run_dir, enabled=engine.is_main)
        self.position = Position()
        self.checkpoints = settings.run_dir / "checkpoints"
        self._saved_step: int | None = None
        self._train_seconds = 0.0
        self.watchdog = Watchdog(settings.run_dir, engine.rank)

    def run(self) -> Outcome:
        """Resume if there is a checkpoint, train, validate, save; return how it ended.

        Raises:
            UserError: too many steps in a row had to be skipped, or data or checkpoint do not fit the run.
        """
        with self.watchdog:
            return self._run()

    def _run(self) -> Outcome:
        config, watch = self.settings.training, self.watchdog
        with watch.section("resume", config.slow_timeout_s):
            self.records.open_mirror(self.settings.logging.wandb, self.settings.run_dir, self.settings.values)
            self._resume()
        if self.position.step >= config.max_steps:
            self._say(f"already finished: {self.settings.run_dir} is at step {self.position.step}")
            return Outcome.FINISHED
        progress = Progress(config.max_steps)
        progress.mark(self.position.step)
        last_step = min(config.max_steps, config.exit_at_step or config.max_steps)
        interrupted, limit = False, config.slow_timeout_s
        batches = self.train_data.steps(self.position.data)
        with StopRequest() as stop:
            while True:
                with watch.section("wait for data", limit):
                    batch, data_state = next(batches)
                began = time.perf_counter()
                step = self.position.step + 1
                with watch.section("step", limit):
                    interrupted, values = self._train_step(step, batch, stop.signal_name is not None, limit)
                limit = config.hang_timeout_s
                self._train_seconds += time.perf_counter() - began + batch.wait_s
                self.position.step, self.position.data = step, data_state
                progress.mark(step)
                values |= self._speed(batch, time.perf_counter() - began + batch.wait_s)
                if self._due(self.settings.logging.log_interval) or step == last_step:
                    self.records.metrics(values)
                    self._say(progress.line(values))
                if self._due(config.eval_interval) or (config.eval_interval and step == config.max_steps):
                    with watch.section("validate", config.slow_timeout_s):
                        self._validate()
                stopping = interrupted or step >= last_step
                if self._due(self.settings.checkpoint.save_interval) or stopping:
                    with watch.section("save", config.slow_timeout_s):
                        self._save()
                if stopping:
                    break
        if self.position.step >= config.max_steps:
            outcome, why = Outcome.FINISHED, "finished"
        elif interrupted:
            outcome, why = Outcome.INTERRUPTED, f"stopped by {stop.signal_name or 'a signal on another rank'}"
        else:
            outcome, why = Outcome.STOPPED, "stopped at training.exit_at_step"
        self.records.event(outcome.value, step=self.position.step, reason=why)
        self.records.close()
        self._say(f"{why} at step {self.position.step}/{config.max_steps}; everything is in {self.settings.run_dir}")
        return outcome

    def _train_step(self, step: int, batch: StepBatch, stop_wanted: bool, limit: float) -> tuple[bool, dict[str, Any]]:
        """Do one optimizer step; return whether all ranks agreed to stop after it, and its metrics."""
        config, engine = self.settings.training, self.engine
        # Valid tokens of the whole window are counted before its first backward: every share has one denominator.
        tokens = sum(int((micro.labels_BS >= 0).sum()) for micro in batch.micro_batches)
        rows = sum(float(micro.row_weight_B.sum()) for micro in batch.micro_batches)
        # fp64 holds the sum of 32-bit hashes exactly.
        values_of_rank = [tokens, rows, float(stop_wanted), batch.skipped_rows, batch.tokens_hash]
        local = torch.tensor(values_of_rank, dtype=torch.float64).to(engine.device)
        counted = engine.sum_over_rows(local).tolist()
        counts = GlobalCounts(tokens=counted[0], rows=counted[1])
        skipped_rows = int(counted[3])
        self.train_data.count_skipped(skipped_rows)

        layers = self.settings.num_layers
        token_terms = torch.zeros(2, device=engine.device)  # lm, z
        row_terms = torch.zeros(2, device=engine.device)  # load balance, entropy
        losses: list[Tensor] = []  # this rank's own; after the reduction every rank's is broken if one is
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
        with self.watchdog.section("optimizer step", limit):
            result = engine.step(rate)
        self._note_skip(step, result, batch, losses)
        if result.skipped is None:
            self.position.tokens += int(counts.tokens)

        lm, z = engine.sum_over_tokens(token_terms).tolist()
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
            "tokens_hash": f"{int(counted[4]) & 0xFFFF_FFFF:08x}",
            "epochs": list(batch.epochs),
            "gates": _gate_statistics(reduced[2:].view(3, layers) / max(counts.rows, 1.0)),
        }
        return counted[2] > 0, values

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

    def _note_skip(self, step: int, result: StepResult, batch: StepBatch, losses: list[Tensor]) -> None:
        if result.skipped is None:
            self.position.skipped_in_a_row = 0
            return
        self.position.skipped_in_a_row += 1
        # All ranks skip together, so all are here. A gradient broken on one rank is broken on each after the
        # reduction; only the rank itself can say whose rows it came from.
        broken = [
            m.rows_B[m.row_weight_B > 0] for m, lm in zip(batch.micro_batches, losses, strict=True) if not lm.isfinite()
        ]
        rows = sorted({int(row) for micro in broken for row in micro})
        mine = ", ".join(self.train_data.describe_row(row) for row in rows[:4])
        named = [text for text in self.engine.gather_text(f"rank {self.engine.rank}: {mine}" if mine else "") if text]
        reason = result.skipped + (f"; loss not finite on {'; '.join(named)}" if named else "")
        self.records.event("step_skipped", step=step, reason=reason)
        self._say(f"step {step} skipped: {reason}")
        limit = self.settings.training.max_skipped_steps
        if self.position.skipped_in_a_row > limit:
            raise UserError(
                f"step {step}: {self.position.skipped_in_a_row} steps in a row were skipped ({reason}), more than "
                f"training.max_skipped_steps {limit}; lower the learning rate or resume from an earlier checkpoint"
            )

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
            "mfu": per_gpu * self.settings.flops_per_token(_document_lengths(batch)) / peak if peak else None,
            "step_time_s": seconds,
            "data_wait_s": batch.wait_s,
            "peak_memory_gib": _peak_memory_gib(self.engine.device),
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
        self.records.metrics({"step": step, "tokens": self.position.tokens, "validation_loss": loss})
        self._say(f"step {step}/{self.settings.training.max_steps}  validation loss {loss:.4f} on {int(tokens)} tokens")

    def _save(self) -> None:
        if self._saved_step == self.position.step:
            return
        began = time.perf_counter()
        values = {
            "config": self.settings.values,
            "tokens": self.position.tokens,
            "data": self.position.data,
            "skipped_in_a_row": self.position.skipped_in_a_row,
            "engine": self.engine.state_values(),
            "rng": {"torch_cpu": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()},
        }
        folder = save_checkpoint(
            self.checkpoints, self.position.step, self.engine.state_tensors(), values, self.settings.extra_files
        )
        self._saved_step = self.position.step
        if self.engine.is_main:
            remove_old(self.checkpoints, self.settings.checkpoint)
        seconds = time.perf_counter() - began
        self.records.event(
            "save",
            step=self.position.step,
            folder=folder.name,
            seconds=round(seconds, 3),
            train_seconds=round(self._train_seconds, 3),
        )
        self._say(f"saved {folder} in {seconds:.1f} s")

    def _resume(self) -> None:
        if self.engine.is_main:
            for partial in remove_partial(self.checkpoints):
                self.records.event("partial_checkpoint_removed", folder=partial.name)
            for hang in collect_hangs(self.settings.run_dir):
                self.records.event("hang", **hang)

        def report(message: str) -> None:
            self.records.event("checkpoint_damaged", reason=message)
            log.warning(message)

        self.engine.barrier()
        folder = newest_good(self.checkpoints, report)
        if folder is None:
            self.records.truncate_metrics(0)
            self.records.event("start", step=0, world_size=self.engine.world_size)
            return
        state = read_state(folder)
        load_tensors(folder, self.engine.state_tensors())
        self.engine.load_state_values(state["engine"])
        rng = torch.frombuffer(bytearray(base64.b64decode(state["rng"]["torch_cpu"])), dtype=torch.uint8)
        torch.set_rng_state(rng)
        self.position = Position(state["step"], state["tokens"], state["data"], state["skipped_in_a_row"])
        self._saved_step = self.position.step
        self.records.truncate_metrics(self.position.step)
        self.records.event("resume", step=self.position.step, folder=folder.name, world_size=self.engine.world_size)
        self._say(f"resumed at step {self.position.step} from {folder}")

    def _due(self, interval: int) -> bool:
        return interval > 0 and self.position.step % interval == 0

    def _say(self, message: str) -> None:
        if self.engine.is_main:
            log.info(message)


def _document_lengths(batch: StepBatch) -> list[int]:
    """Tokens of each piece of a document in this rank's rows: what attention can look back on."""
    starts = torch.cat([micro.positions_BS.flatten() == 0 for micro in batch.micro_batches]).nonzero().flatten()
    total = sum(micro.positions_BS.numel() for micro in batch.micro_batches)
    return torch.cat([starts, torch.tensor([total])]).diff().tolist()


def _gate_statistics(means_3L: Tensor) -> dict[str, list[float]]:
    mean_L, square_L, entropy_L = means_3L.double()
    return {
        "mean": mean_L.tolist(),
        "std": (square_L - mean_L.square()).clamp(min=0).sqrt().tolist(),
        "entropy": entropy_L.tolist(),
    }


def _peak_memory_gib(device: torch.device) -> float:
    """Peak memory of the device, or of the process where the device is the CPU (Linux counts it in KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
