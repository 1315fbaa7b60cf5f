"""What a logged step says about speed, memory and gates. L layers, B rows, S tokens of a row."""

from __future__ import annotations

import resource

import torch
from torch import Tensor

from fusiontree.data.batch import StepBatch


def document_lengths(batch: StepBatch) -> list[int]:
    """Tokens of each piece of a document in this rank's rows: what attention can look back on."""
    starts = torch.cat([micro.positions_BS.flatten() == 0 for micro in batch.micro_batches]).nonzero().flatten()
    total = sum(micro.positions_BS.numel() for micro in batch.micro_batches)
    return torch.cat([starts, torch.tensor([total])]).diff().tolist()


def gate_statistics(means_3L: Tensor) -> dict[str, list[float]]:
    """Return each layer's gate statistics from the mean gate, mean square and mean entropy."""
    mean_L, square_L, entropy_L = means_3L.double()
    return {
        "mean": mean_L.tolist(),
        "std": (square_L - mean_L.square()).clamp(min=0).sqrt().tolist(),
        "entropy": entropy_L.tolist(),
    }


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of the device, or of the process where the device is the CPU (Linux counts it in KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
