"""What the devices can do at most, and how much memory is free."""

from __future__ import annotations

from pathlib import Path

import torch

# Dense peak of the tensor cores in FLOP/s, without sparsity: NVIDIA's data sheets. H200 has H100's compute.
_BF16_PEAK = {"H100": 989.4e12, "H200": 989.4e12, "GH200": 989.4e12, "A100": 312e12, "B200": 2250e12}


def available_memory() -> int | None:
    """Return the bytes of CPU memory that can be had, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the dense peak of ``device`` at bf16/fp16 in FLOP/s; None for fp32 and for devices not listed."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _BF16_PEAK.items() if key in name.replace("-", " ").split()), None)
