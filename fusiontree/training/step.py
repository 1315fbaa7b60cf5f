"""One optimizer step: count, forward and backward of every micro batch, judge the loss, apply.

Everything is queued for the device, and what comes of it is read one step later: a host that waited for the end of each
step would leave the device idle while it prepares the next one.

Shape legend: L layers, B rows of a micro batch, S tokens of a row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusiontree.data.batch import MicroBatch, StepBatch
from fusiontree.engines.base import Engine, StepInputs, StepResult
from fusiontree.supervision.watchdog import Watchdog
from fusiontree.training.branch_dropout import branch_scale
from fusiontree.training.losses import GlobalCounts, loss_terms
from fusiontree.training.measurements import document_lengths, gate_statistics, peak_memory_gib
from fusiontree.training.schedule import learning_rate
from fusiontree.training.settings import RunSettings
from fusiontree.training.spikes import SpikeFilter
from fusiontree.training.step_sums import RowSums, StepCounts, TokenSums, read_step_counts
from fusiontree.utils.device import Mark, copy_to_host, send


@dataclass(frozen=True)
class PendingStep:
    """A step that is queued on the device; reading its results waits for the device."""

    number: int
    batch: StepBatch
    rate: float
    """The learning rate."""
    reached_collective_at: float
    """When this rank reached the first collective of the step, as ``time.perf_counter`` counts."""
    losses: list[Tensor]
    """This rank's losses before any reduction, one per micro-batch. After the reduction a broken loss of one rank is a
    broken loss of all."""
    spike: str | None
    """Why the gradient was not applied, if the reason is a loss spike; else None."""
    stop: bool
    """All ranks agreed to stop after it."""
    result: StepResult
    """What the optimizer made of it."""
    counts: Callable[[], StepCounts]
    """Counts of the global batch."""
    token_sums: Callable[[], TokenSums]
    row_sums: Callable[[], RowSums]
    ended: Mark
    """Its end on the device."""

    def wait(self) -> None:
        """Let the device finish it."""
        self.row_sums()


class TrainStep:
    """Executes the optimizer steps of a run."""

    def __init__(
        self, settings: RunSettings, engine: Engine, train_data: Any, watchdog: Watchdog, spikes: SpikeFilter
    ) -> None:
        """Connect the parts of a step.

        Args:
            settings: the run's configuration.
            engine: executes.
            train_data: is told of skipped rows.
            watchdog: is told which section of the step is running.
            spikes: judges the loss.
        """
        self.settings, self.engine, self.train_data = settings, engine, train_data
        self.watchdog, self.spikes = watchdog, spikes

    def run(
        self, step: int, batch: StepBatch, *, stop_wanted: bool, limit: float, overlap_work: Callable[[], None]
    ) -> PendingStep:
        """Queue one optimizer step; all ranks call this together. A broken gradient or a loss spike is not applied.

        Args:
            step: number of the step; the first is 1.
            batch: this rank's part of the global batch.
            stop_wanted: whether this rank was asked to stop.
            limit: seconds that any section of the step may take.
            overlap_work: called after all backward passes are queued and before the optimizer step; the trainer reads
                the previous step's results here.
        """
        counted = count(batch, stop_wanted)
        reached_collective_at = time.perf_counter()
        counts, denominators = self._sum_counts(counted)
        losses, token_sums, row_terms = self._forward_backward(step, batch, denominators, limit)
        overlap_work()
        rate = learning_rate(step, self.settings.training)
        with self.watchdog.section("optimizer step", limit):
            self.train_data.count_skipped(counts().skipped_rows)
            spike, result = self._apply(batch, rate, token_sums)
        summed = copy_to_host(self.engine.sum_over_rows(row_terms))
        return PendingStep(
            number=step,
            batch=batch,
            rate=rate,
            reached_collective_at=reached_collective_at,
            losses=losses,
            spike=spike,
            stop=counts().stop_requests > 0,
            result=result,
            counts=counts,
            token_sums=token_sums,
            row_sums=lambda: RowSums.unpack(summed()),
            ended=Mark(self.engine.device),
        )

    def _sum_counts(self, counted: StepCounts) -> tuple[Callable[[], StepCounts], GlobalCounts]:
        """Sum the counts over the ranks before the first backward pass: all micro-batches share denominators."""
        engine = self.engine
        summed = engine.sum_over_ranks(send(counted.pack(), engine.device, non_blocking=True))
        ranks_per_row = engine.world_size // engine.dp_size
        denominators = GlobalCounts(*StepCounts.denominators(summed, ranks_per_row))
        return read_step_counts(summed, ranks_per_row), denominators

    def _forward_backward(
        self, step: int, batch: StepBatch, counts: GlobalCounts, limit: float
    ) -> tuple[list[Tensor], Callable[[], TokenSums], Tensor]:
        """Queue forward and backward pass of every micro-batch.

        Returns:
            The losses per micro-batch, the function that reads the token sums, and this rank's packed row sums.
        """
        engine, last = self.engine, len(batch.micro_batches) - 1
        token_terms = torch.zeros(len(TokenSums._fields), device=engine.device)
        row_terms = torch.zeros(2 + 3 * self.settings.num_layers, device=engine.device)
        losses: list[Tensor] = []
        for index, micro in enumerate(batch.micro_batches):
            with self.watchdog.section(f"forward of micro batch {index}", limit):
                out = engine.forward(step_inputs(micro, self.settings, step))
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
            token_terms += TokenSums.pack(terms.lm, terms.z)
            if index == last:  # before the backward pass, so that nobody waits for it to end
                with self.watchdog.section("sum of the loss over the ranks", limit):
                    read = copy_to_host(engine.sum_over_tokens(token_terms))
            with self.watchdog.section(f"backward of micro batch {index}", limit):
                engine.backward(terms.total, last=index == last)
            losses.append(terms.lm.detach())
            row_terms += RowSums.pack(
                terms.load_balance,
                terms.entropy,
                gate_LB=out.gate_sum_LB,
                square_LB=out.square_sum_LB,
                entropy_LB=out.entropy_sum_LB,
                count_B=out.count_B,
                row_weight_B=out.row_weight_B,
            )
        return losses, lambda: TokenSums(*read()), row_terms

    def _apply(
        self, batch: StepBatch, rate: float, token_sums: Callable[[], TokenSums]
    ) -> tuple[str | None, StepResult]:
        """Apply the gradient unless the loss is a spike; a spike must not reach the weights."""
        if self.settings.training.spikes.policy != "off":
            spike = self.spikes.judge(token_sums().lm, batch.seq_len)
            if spike:
                self.engine.discard()
                return spike, StepResult(lambda: math.nan, unless_finite=spike)
        return None, self.engine.step(rate)

    def values(self, done: PendingStep, tokens: int) -> dict[str, Any]:
        """Return the metrics of a step; ``tokens`` were trained on so far, this step's included if it was applied."""
        token_sums, row_sums, counts = done.token_sums(), done.row_sums(), done.counts()
        weights = self.settings.loss_weights
        loss = token_sums.lm + weights.z_loss * token_sums.z
        return {
            "step": done.number,
            "tokens": tokens,
            "loss": loss + weights.load_balance * row_sums.load_balance + weights.entropy * row_sums.entropy,
            "lm_loss": token_sums.lm,
            "load_balance_loss": row_sums.load_balance,
            "entropy_loss": row_sums.entropy,
            "z_loss": token_sums.z,
            "grad_norm": done.result.grad_norm,
            "lr": done.rate,
            "seq_len": done.batch.seq_len,
            "skipped_rows": counts.skipped_rows,
            "tokens_hash": f"{counts.tokens_hash & 0xFFFF_FFFF:08x}",
            "epochs": list(done.batch.epochs),
            "gates": gate_statistics(row_sums, counts.rows),
        }

    def speed(self, batch: StepBatch, seconds: float) -> dict[str, Any]:
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


def count(batch: StepBatch, stop_wanted: bool) -> StepCounts:
    """Count this rank's part of a global batch."""
    return StepCounts(
        tokens=sum(int((micro.labels_BS >= 0).sum()) for micro in batch.micro_batches),
        rows=sum(int(micro.row_weight_B.count_nonzero()) for micro in batch.micro_batches),
        skipped_rows=batch.skipped_rows,
        tokens_hash=batch.tokens_hash,
        stop_requests=int(stop_wanted),
    )


def step_inputs(micro: MicroBatch, settings: RunSettings, step: int | None) -> StepInputs:
    """Return a micro batch as the engine takes it; branches are dropped in training steps, not where step is None."""
    scale = None
    if step is not None:
        scale = branch_scale(
            micro.rows_B.tolist(),
            layers=settings.num_layers,
            probability=settings.drop_branch_prob,
            seed=settings.training.seed,
            step=step,
        )
    return StepInputs(micro.input_ids_BS, micro.labels_BS, micro.positions_BS, micro.row_weight_B, scale)
