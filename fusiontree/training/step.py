"""One optimizer step: count, forward and backward of every micro batch, judge the loss, apply.

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
from fusiontree.training.branch_dropout import branch_scale
from fusiontree.training.losses import GlobalCounts, loss_terms
from fusiontree.training.measurements import document_lengths, gate_statistics, peak_memory_gib
from fusiontree.training.schedule import learning_rate
from fusiontree.training.settings import RunSettings
from fusiontree.training.spikes import SpikeFilter
from fusiontree.training.watchdog import Watchdog


@dataclass(frozen=True)
class StepDone:
    """What became of one step on this rank."""

    values: dict[str, Any]
    """Its metrics."""
    tokens: int
    """Tokens that the run trained on so far, with its own where it was not skipped."""
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

    def run(self, step: int, batch: StepBatch, *, tokens_before: int, stop_wanted: bool, limit: float) -> StepDone:
        """Do one optimizer step, or leave it out where its loss or gradient forbids it; all ranks together.

        Args:
            step: its number; the first is 1.
            batch: this rank's part of the global batch.
            tokens_before: tokens that the run trained on so far.
            stop_wanted: whether this rank was asked to stop.
            limit: seconds that any part of it may take.
        """
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
                    loss_of_all = _on_its_way(engine.sum_over_tokens(token_terms))
            with self.watchdog.section(f"backward of micro batch {index}", limit):
                engine.backward(terms.total, last=last)
            losses.append(terms.lm.detach())
            row_terms += torch.stack([terms.load_balance.detach(), terms.entropy.detach()])
            share_B = out.row_weight_B / out.count_B.clamp(min=1)
            sums_3LB = torch.stack([out.gate_sum_LB, out.square_sum_LB, out.entropy_sum_LB]).detach()
            gate_sums_3L += (sums_3LB * share_B).sum(-1)
        rate = learning_rate(step, config)
        # Before the optimizer step: a spike must not get into the weights.
        lm, z = loss_of_all()
        spike = self._agree_on_spike(lm, batch.seq_len)
        with self.watchdog.section("optimizer step", limit):
            if spike:
                engine.discard()
                result = StepResult(math.nan, skipped=spike)
            else:
                result = engine.step(rate)
        trained = tokens_before
        if result.skipped is None:
            trained += int(counts.tokens)
            self.spikes.accept(lm, batch.seq_len)

        reduced = engine.sum_over_rows(torch.cat([row_terms, gate_sums_3L.flatten()])).cpu()
        load_balance, entropy = reduced[:2].tolist()
        weights = self.settings.loss_weights
        total = lm + weights.z_loss * z + weights.load_balance * load_balance + weights.entropy * entropy
        values = {
            "step": step,
            "tokens": trained,
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
        return StepDone(values, trained, result.skipped, spike, losses, stop > 0, arrived)

    def _agree_on_spike(self, loss: float, seq_len: int) -> str | None:
        """Return what all ranks think of the loss; sums may differ in their last digit between ranks."""
        if self.settings.training.spike_policy == "off":
            return None
        mine = self.spikes.judge(loss, seq_len)
        anyone = self.engine.sum_over_ranks(torch.tensor([float(mine is not None)], device=self.engine.device))
        return (mine or "loss spike on another rank") if float(anyone) else None

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


def _on_its_way(values: Tensor) -> Callable[[], list[float]]:
    """Begin to bring values to the host; the result waits for them, and for nothing that is queued after them."""
    if values.device.type != "cuda":
        return values.tolist
    here = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> list[float]:
        arrived.synchronize()
        return here.tolist()

    return read


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
