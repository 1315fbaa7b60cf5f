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
from fusiontree.training.step_counts import StepCounts, read_step_counts
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
    """This rank's own, one a micro batch; after the reduction every rank's is broken if one is."""
    spike: str | None
    """Why the gradient was not applied, if the reason is a loss spike; else None."""
    stop: bool
    """All ranks agreed to stop after it."""
    result: StepResult
    """What the optimizer made of it."""
    read_counts: Callable[[], StepCounts]
    """The counts of the global batch."""
    read_loss: Callable[[], list[float]]
    """Over all ranks: cross entropy, z-loss."""
    read_gates: Callable[[], list[float]]
    """Over all ranks: load balance and entropy loss, sums of gates, squares and entropies by layer."""
    ended: Mark
    """Its end."""

    def wait(self) -> None:
        """Let the device finish it."""
        self.read_gates()


class TrainStep:
    """Does the steps of a run."""

    def __init__(
        self, settings: RunSettings, engine: Engine, train_data: Any, watchdog: Watchdog, spikes: SpikeFilter
    ) -> None:
        """Wire up.

        Args:
            settings: what the configuration says.
            engine: executes.
            train_data: is told of skipped rows.
            watchdog: is told what the step is doing.
            spikes: judges the loss.
        """
        self.settings, self.engine, self.train_data = settings, engine, train_data
        self.watchdog, self.spikes = watchdog, spikes

    def run(
        self, step: int, batch: StepBatch, *, stop_wanted: bool, limit: float, overlap_work: Callable[[], None]
    ) -> PendingStep:
        """Queue one optimizer step, or leave it out where its loss or gradient forbids it; all ranks together.

        Args:
            step: its number; the first is 1.
            batch: this rank's part of the global batch.
            stop_wanted: whether this rank was asked to stop.
            limit: seconds that any part of it may take.
            overlap_work: called after all backward passes are queued and before the optimizer step; the trainer reads
                the previous step's results here.
        """
        config, engine = self.settings.training, self.engine
        # Valid tokens of the whole window are counted before its first backward: every share has one denominator.
        tokens = sum(int((micro.labels_BS >= 0).sum()) for micro in batch.micro_batches)
        rows = sum(int(micro.row_weight_B.count_nonzero()) for micro in batch.micro_batches)
        of_rank = StepCounts(tokens, rows, batch.skipped_rows, batch.tokens_hash, int(stop_wanted))
        reached_collective_at = time.perf_counter()
        summed = engine.sum_over_ranks(send(of_rank.pack(), engine.device, non_blocking=True))
        sharing = engine.world_size // engine.dp_size
        read_counts = read_step_counts(summed, sharing)
        counts = GlobalCounts(*StepCounts.denominators(summed, sharing))

        layers = self.settings.num_layers
        token_terms = torch.zeros(2, device=engine.device)  # lm, z
        row_terms = torch.zeros(2, device=engine.device)  # load balance, entropy
        losses: list[Tensor] = []
        gate_sums_3L = torch.zeros(3, layers, device=engine.device)  # of row means: gate, its square, its entropy
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
            last = index == len(batch.micro_batches) - 1
            token_terms += torch.stack([terms.lm.detach(), terms.z.detach()])
            if last:  # before the backward pass, so that nobody waits for it to end
                with self.watchdog.section("sum of the loss over the ranks", limit):
                    read_loss = copy_to_host(engine.sum_over_tokens(token_terms))
            with self.watchdog.section(f"backward of micro batch {index}", limit):
                engine.backward(terms.total, last=last)
            losses.append(terms.lm.detach())
            row_terms += torch.stack([terms.load_balance.detach(), terms.entropy.detach()])
            share_B = out.row_weight_B / out.count_B.clamp(min=1)
            sums_3LB = torch.stack([out.gate_sum_LB, out.square_sum_LB, out.entropy_sum_LB]).detach()
            gate_sums_3L += (sums_3LB * share_B).sum(-1)
        overlap_work()
        rate = learning_rate(step, config)
        with self.watchdog.section("optimizer step", limit):
            summed_counts = read_counts()
            self.train_data.count_skipped(summed_counts.skipped_rows)
            spike = None
            if config.spike_policy != "off":  # before the optimizer step: a spike must not get into the weights
                spike = self.spikes.judge(read_loss()[0], batch.seq_len)
            if spike:
                engine.discard()
                result = StepResult(lambda: math.nan, unless_finite=spike)
            else:
                result = engine.step(rate)
        read_gates = copy_to_host(engine.sum_over_rows(torch.cat([row_terms, gate_sums_3L.flatten()])))
        return PendingStep(
            number=step,
            batch=batch,
            rate=rate,
            reached_collective_at=reached_collective_at,
            losses=losses,
            spike=spike,
            stop=summed_counts.stop_requests > 0,
            result=result,
            read_counts=read_counts,
            read_loss=read_loss,
            read_gates=read_gates,
            ended=Mark(engine.device),
        )

    def values(self, done: PendingStep, tokens: int) -> dict[str, Any]:
        """Return the metrics of a step; ``tokens`` were trained on so far, its own included where it was applied."""
        lm, z = done.read_loss()
        load_balance, entropy, *gate_sums = done.read_gates()
        counts = done.read_counts()
        weights = self.settings.loss_weights
        means_3L = torch.tensor(gate_sums).view(3, self.settings.num_layers) / max(counts.rows, 1)
        return {
            "step": done.number,
            "tokens": tokens,
            "loss": lm + weights.z_loss * z + weights.load_balance * load_balance + weights.entropy * entropy,
            "lm_loss": lm,
            "load_balance_loss": load_balance,
            "entropy_loss": entropy,
            "z_loss": z,
            "grad_norm": done.result.grad_norm,
            "lr": done.rate,
            "seq_len": done.batch.seq_len,
            "skipped_rows": counts.skipped_rows,
            "tokens_hash": f"{counts.tokens_hash & 0xFFFF_FFFF:08x}",
            "epochs": list(done.batch.epochs),
            "gates": gate_statistics(means_3L),
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
