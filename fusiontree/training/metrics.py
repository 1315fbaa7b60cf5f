"""Metrics of a finished step, under their names in metrics.jsonl. Shape legend: L layers."""

from __future__ import annotations

import math
import resource
from typing import Any

import torch

from fusiontree.data.batch import StepBatch
from fusiontree.training.pipeline import FinishedStep
from fusiontree.training.settings import RunSettings
from fusiontree.utils.layer_metrics import layer_metric_values


def step_metrics(step: FinishedStep, settings: RunSettings, world_size: int, device: torch.device) -> dict[str, Any]:
    """Return the metrics of a step.

    Args:
        step: the step.
        settings: the run's configuration.
        world_size: number of processes.
        device: this rank's device, for its peak memory.
    """
    token_sums, row_sums, counts = step.token_sums, step.row_sums, step.counts
    weights, training = settings.loss_weights, settings.training
    loss = token_sums.lm + weights.z_loss * token_sums.z
    # All tokens of the global batch count, as the device computes all of them.
    tokens_per_s = training.global_batch_size * training.seq_len / step.device_s
    flops_per_s = tokens_per_s / world_size * settings.flops_per_token(document_lengths(step.batch))
    per_row = 1.0 / max(counts.rows, 1)
    means_L = {name: [total * per_row for total in total_L] for name, total_L in row_sums.layers.items()}
    return {
        "step": step.number,
        "tokens": step.tokens,
        "loss": loss + weights.load_balance * row_sums.load_balance + weights.entropy * row_sums.entropy,
        "lm_loss": token_sums.lm,
        "load_balance_loss": row_sums.load_balance,
        "entropy_loss": row_sums.entropy,
        "z_loss": token_sums.z,
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
        "step_time_s": step.device_s,
        "data_wait_s": step.batch.wait_s,
        "peak_memory_gib": peak_memory_gib(device),
    }


def document_lengths(batch: StepBatch) -> list[int]:
    """Return the number of tokens of each document in this rank's rows."""
    starts = torch.cat([micro.positions_BS.flatten() == 0 for micro in batch.micro_batches]).nonzero().flatten()
    total = sum(micro.positions_BS.numel() for micro in batch.micro_batches)
    return torch.cat([starts, torch.tensor([total])]).diff().tolist()


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
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
