"""What a logged step says about speed, memory and gates. L layers, B rows, S tokens of a row."""

from __future__ import annotations

import math
import resource

import torch

from fusiontree.data.batch import StepBatch
from fusiontree.training.step_sums import RowSums


def document_lengths(batch: StepBatch) -> list[int]:
    """Tokens of each piece of a document in this rank's rows: what attention can look back on."""
    starts = torch.cat([micro.positions_BS.flatten() == 0 for micro in batch.micro_batches]).nonzero().flatten()
    total = sum(micro.positions_BS.numel() for micro in batch.micro_batches)
    return torch.cat([starts, torch.tensor([total])]).diff().tolist()


def gate_statistics(sums: RowSums, rows: int) -> dict[str, list[float]]:
    """Return each layer's mean gate, its standard deviation, and the gates' mean entropy in nats.

    Args:
        sums: sums over the global batch.
        rows: number of rows they are sums over.
    """
    per_row = 1.0 / max(rows, 1)
    mean_L = [gate * per_row for gate in sums.gate_L]
    square_L = [square * per_row for square in sums.square_L]
    variance_L = [square - mean * mean for square, mean in zip(square_L, mean_L, strict=True)]
    return {
        "mean": mean_L,
        "std": [math.sqrt(max(variance, 0.0)) for variance in variance_L],
        "entropy": [entropy * per_row for entropy in sums.entropy_L],
    }


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of the device, or of the process where the device is the CPU (Linux counts it in KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
