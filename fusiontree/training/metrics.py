"""Metrics of a finished step, under their names in metrics.jsonl. Shape legend: L layers."""

from __future__ import annotations

import math
import resource
from collections.abc import Sequence
from typing import Any

import torch

from fusiontree.training.pipeline import FinishedStep
from fusiontree.training.settings import RunSettings
from fusiontree.utils.cuda_graph import peak_memory
from fusiontree.utils.layer_metrics import layer_metric_values


class Interval:
    """Losses and times of the steps since the last logged one; a logged line has their means."""

    def __init__(self) -> None:
        """Start without steps."""
        self._steps: list[tuple[float, ...]] = []

    def add(self, step: FinishedStep) -> None:
        """Add a finished step."""
        sums, rows = step.token_sums, step.row_sums
        losses = (sums.lm, sums.z, sums.divergence, rows.load_balance, rows.entropy)
        self._steps.append((*losses, step.device_s, step.batch.wait_s))

    def clear(self) -> None:
        """Forget all steps."""
        self._steps.clear()

    def __len__(self) -> int:
        return len(self._steps)

    def means(self) -> tuple[float, ...]:
        """Return the means of cross entropy, z-loss, divergence from the teacher, load balance loss, entropy, seconds
        on the device and seconds of waiting.

        A loss that is not finite is left out of its mean, which is NaN if none is finite.
        """
        return tuple(_mean(values) for values in zip(*self._steps, strict=True))


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def step_metrics(
    step: FinishedStep, settings: RunSettings, world_size: int, device: torch.device, interval: Interval | None = None
) -> dict[str, Any]:
    """Return the metrics of a logged step.

    Args:
        step: the step.
        settings: the run's configuration.
        world_size: number of processes.
        device: this rank's device, for its peak memory.
        interval: the steps over which losses, times and rates are averaged, including ``step``; None: ``step`` alone.
    """
    if interval is None:
        interval = Interval()
        interval.add(step)
    lm_loss, z_loss, divergence, load_balance, entropy, step_s, wait_s = interval.means()
    row_sums, counts = step.row_sums, step.counts
    weights, training = settings.loss_weights, settings.training
    share = weights.distillation
    loss = (1.0 - share) * lm_loss + share * divergence + weights.z_loss * z_loss
    # All tokens of the global batch count, as the device computes all of them.
    tokens_per_s = training.global_batch_size * training.seq_len / step_s
    flops_per_s = counts.flops / step_s / world_size
    per_row = 1.0 / max(counts.rows, 1)
    means_L = {name: [total * per_row for total in total_L] for name, total_L in row_sums.layers.items()}
    return {
        "step": step.number,
        "tokens": step.tokens,
        "averaged_steps": len(interval),
        "loss": loss + weights.load_balance * load_balance + weights.entropy * entropy,
        "lm_loss": lm_loss,
        "load_balance_loss": load_balance,
        "entropy_loss": entropy,
        "z_loss": z_loss,
        **({"distillation_loss": divergence} if share else {}),
        "grad_norm": step.grad_norm,
        "lr": step.learning_rate,
        "seq_len": step.batch.seq_len,
        "skipped_rows": counts.skipped_rows,
        "tokens_hash": f"{counts.tokens_hash & 0xFFFF_FFFF:08x}",
        "epochs": list(step.batch.epochs),
        "gates": gate_statistics(means_L),
        **{name: layer_metric_values(name, means_L) for name in settings.layer_metrics(step.number)},
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_per_gpu": tokens_per_s / world_size,
        "mfu": flops_per_s / settings.peak_flops if settings.peak_flops else None,
        "step_time_s": step_s,
        "data_wait_s": wait_s,
        "peak_memory_gib": peak_memory_gib(device),
    }


def gate_statistics(means_L: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return each layer's mean gate, its standard deviation, and the gates' mean entropy in nats."""
    variance_L = [square - mean * mean for square, mean in zip(means_L["square"], means_L["gate"], strict=True)]
    return {
        "mean": means_L["gate"],
        "std": [math.sqrt(max(variance, 0.0)) for variance in variance_L],
        "entropy": means_L["entropy"],
    }


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of the device, or of the process where the device is the CPU (Linux counts it in KiB)."""
    if device.type == "cuda":
        return peak_memory(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
