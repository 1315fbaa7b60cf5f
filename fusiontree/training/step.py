"""One optimizer step: count, forward and backward of every micro-batch, judge the loss, apply.

All work is queued for the device. ``pipeline.py`` reads the results one step later: a host that waited for the end of
each step would leave the device idle while it prepares the next step.

Shape legend: L layers, B rows of a micro-batch, S tokens of a row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusiontree.data.batch import FILLER, MicroBatch, StepBatch
from fusiontree.data.loader import TrainingData
from fusiontree.engines.base import Engine, StepResult
from fusiontree.supervision.watchdog import Watchdog
from fusiontree.training.losses import GlobalCounts
from fusiontree.training.passes import PassInputs
from fusiontree.training.recorded_passes import RecordedPasses, build_passes
from fusiontree.training.schedule import branch_scale, learning_rate
from fusiontree.training.settings import RunSettings
from fusiontree.training.spikes import SpikeFilter
from fusiontree.training.step_sums import RowSums, StepCounts, TokenSums, read_step_counts
from fusiontree.utils.device import Mark, copy_to_host, send


@dataclass(frozen=True)
class StepGradient:
    """The gradient of a step, whose forward and backward passes are queued on the device."""

    number: int
    batch: StepBatch
    reached_collective_at: float
    """When this rank reached the step's first collective, in the seconds of ``time.perf_counter``."""
    losses: list[Tensor]
    """This rank's losses per micro-batch before any reduction, after which a NaN of one rank is a NaN of all."""
    counts: Callable[[], StepCounts]
    """Waits for the counts of the global batch."""
    token_sums: Callable[[], TokenSums]
    """Waits for the sums over the tokens of the global batch."""
    row_terms: Tensor
    """This rank's packed row sums."""
    sum_names: tuple[str, ...]
    """Names of the layer sums in ``row_terms``."""


@dataclass(frozen=True)
class PendingStep:
    """A step that is queued on the device; reading its results waits for the device."""

    gradient: StepGradient
    learning_rate: float
    spike: str | None
    """Why the gradient was not applied, if the reason is a loss spike; else None."""
    stop: bool
    """A rank was asked to stop: all ranks stop after this step."""
    result: StepResult
    """Result of the optimizer step."""
    row_sums: Callable[[], RowSums]
    """Waits for the sums over the rows of the global batch, which are the last work of the step."""
    ended: Mark
    """Its end on the device."""

    def wait(self) -> None:
        """Wait until the device has executed the step."""
        self.row_sums()


class TrainStep:
    """Executes optimizer steps: :meth:`compute_gradient`, then :meth:`apply`. No operation waits for the device."""

    def __init__(
        self, settings: RunSettings, engine: Engine, train_data: TrainingData, watchdog: Watchdog, spikes: SpikeFilter
    ) -> None:
        """Connect the parts of a step.

        Args:
            settings: the run's configuration.
            engine: executes.
            train_data: is told the number of skipped rows.
            watchdog: is told the section of the step.
            spikes: judges the loss.
        """
        self.settings, self.engine, self.train_data = settings, engine, train_data
        self.watchdog, self.spikes = watchdog, spikes
        self.passes = build_passes(engine, settings.config.model, settings.training, settings.loss_weights)

    def compute_gradient(self, number: int, batch: StepBatch, *, stop_wanted: bool, limit_s: float) -> StepGradient:
        """Queue forward and backward pass of every micro-batch; all ranks call this together.

        Args:
            number: number of the step; the first is 1.
            batch: this rank's part of the global batch.
            stop_wanted: whether this rank was asked to stop.
            limit_s: seconds that any section of the step may take; 0 sets no limit.
        """
        flops = model_flops(batch, self.settings.flops_per_token) if self.settings.is_logged(number) else 0
        counted = count(batch, stop_wanted)._replace(flops=flops)
        reached_collective_at = time.perf_counter()
        counts, denominators = self._sum_counts(counted)
        losses, token_sums, row_terms, names = self._forward_backward(number, batch, denominators, limit_s)
        return StepGradient(number, batch, reached_collective_at, losses, counts, token_sums, row_terms, names)

    def apply(self, gradient: StepGradient, *, limit_s: float) -> PendingStep:
        """Queue the optimizer step; all ranks call this together. A loss spike or a non-finite gradient is not applied.

        Args:
            gradient: of :meth:`compute_gradient`.
            limit_s: seconds that the optimizer step may take; 0 sets no limit.
        """
        rate = learning_rate(gradient.number, self.settings.training)
        with self.watchdog.section("optimizer step", limit_s):
            counts = gradient.counts()
            self.train_data.count_skipped(counts.skipped_rows)
            spike = self._spike(gradient)
            if spike:
                self.engine.discard()
            result = StepResult(lambda: math.nan, unless_finite=spike) if spike else self.passes.step(rate)
        summed = copy_to_host(self.engine.sum_over_rows(gradient.row_terms))
        return PendingStep(
            gradient=gradient,
            learning_rate=rate,
            spike=spike,
            stop=counts.stop_requests > 0,
            result=result,
            row_sums=lambda: RowSums.unpack(summed(), gradient.sum_names),
            ended=Mark(self.engine.device),
        )

    def _spike(self, gradient: StepGradient) -> str | None:
        """Return why the loss is a spike, or None; a spike must not reach the parameters."""
        if self.settings.training.spikes.policy == "off":
            return None
        return self.spikes.judge(gradient.token_sums().lm, gradient.batch.seq_len)

    def _sum_counts(self, counted: StepCounts) -> tuple[Callable[[], StepCounts], GlobalCounts]:
        """Sum the counts over the ranks before the first backward pass: all micro-batches share denominators."""
        engine = self.engine
        summed = engine.sum_over_ranks(send(counted.pack(), engine.device, non_blocking=True))
        ranks_per_row = engine.world_size // engine.dp_size
        denominators = GlobalCounts(*StepCounts.denominators(summed, ranks_per_row))
        return read_step_counts(summed, ranks_per_row), denominators

    def _forward_backward(
        self, number: int, batch: StepBatch, counts: GlobalCounts, limit_s: float
    ) -> tuple[list[Tensor], Callable[[], TokenSums], Tensor, tuple[str, ...]]:
        """Queue forward and backward pass of every micro-batch.

        Returns:
            The losses per micro-batch, the function that reads the token sums, this rank's packed row sums and the
            names of the layer sums in them.
        """
        engine, last = self.engine, len(batch.micro_batches) - 1
        token_terms = torch.zeros(len(TokenSums._fields), device=engine.device)
        row_terms: list[Tensor] = []
        losses: list[Tensor] = []
        # Recorded passes are the same in every step.
        every_step = isinstance(self.passes, RecordedPasses)
        metrics = self.settings.all_layer_metrics if every_step else self.settings.layer_metrics(number)
        with self.watchdog.section("agreement on the passes of the step", limit_s):
            self.passes.begin(batch.micro_batches)
        for index, micro in enumerate(batch.micro_batches):
            inputs = PassInputs(micro, self._branch_scale(micro, number), metrics, counts, index, index == last)
            with self.watchdog.section(f"forward of micro batch {index}", limit_s):
                done = self.passes.forward(inputs)
            token_terms += TokenSums.pack(done.lm, done.z, done.divergence)
            if index == last:  # before the backward pass, so that the sum does not wait for its end
                with self.watchdog.section("sum of the loss over the ranks", limit_s):
                    read = copy_to_host(engine.sum_over_tokens(token_terms))
            with self.watchdog.section(f"backward of micro batch {index}", limit_s):
                self.passes.backward(inputs, done)
            losses.append(done.lm)
            row_terms.append(done.row_terms)
            names = done.sum_names
        return losses, lambda: TokenSums(*read()), sum(row_terms[1:], row_terms[0]), names

    def _branch_scale(self, micro: MicroBatch, step: int) -> Tensor | None:
        """Return the factors of the branch outputs ``[L, B, 2]`` in a training step."""
        model = self.settings.config.model
        return branch_scale(
            micro.rows_B.tolist(),
            layers=model.num_layers,
            probability=model.drop_branch_prob,
            seed=self.settings.training.seed,
            step=step,
        )


def count(batch: StepBatch, stop_wanted: bool) -> StepCounts:
    """Count this rank's part of a global batch."""
    return StepCounts(
        tokens=sum(int((micro.labels_BS >= 0).sum()) for micro in batch.micro_batches),
        rows=sum(int(micro.row_weight_B.count_nonzero()) for micro in batch.micro_batches),
        skipped_rows=batch.skipped_rows,
        tokens_hash=batch.tokens_hash,
        stop_requests=int(stop_wanted),
    )


def model_flops(batch: StepBatch, flops_per_token: Callable[[list[int]], float]) -> int:
    """Return the model FLOPs of this rank's part of a global batch, without filler rows."""
    kept = [replace(m, positions_BS=m.positions_BS[m.rows_B != FILLER]) for m in batch.micro_batches]
    lengths = document_lengths(replace(batch, micro_batches=kept))
    return round(flops_per_token(lengths) * sum(lengths)) if lengths else 0


def document_lengths(batch: StepBatch) -> list[int]:
    """Return the number of tokens of each document in this rank's rows."""
    starts = torch.cat([micro.positions_BS.flatten() == 0 for micro in batch.micro_batches]).nonzero().flatten()
    total = sum(micro.positions_BS.numel() for micro in batch.micro_batches)
    return torch.cat([starts, torch.tensor([total])]).diff().tolist()
