"""Devices: choice, peak rate, copies from and to the CPU, time on the device; free memory of the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusiontree.utils.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Dense peak of the tensor cores in FLOP/s, without sparsity: NVIDIA's data sheets. H200 has H100's compute.
_BF16_PEAK = {"H100": 989.4e12, "H200": 989.4e12, "GH200": 989.4e12, "A100": 312e12, "B200": 2250e12}


def choose_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Resolve ``--device`` and ``--dtype``.

    Args:
        device: auto (a GPU if torch sees one), cpu, cuda or cuda:N.
        dtype: auto (bfloat16 on a GPU, float32 on a CPU) or a name in ``DTYPES``.

    Raises:
        UserError: the device does not exist here, or the dtype is unknown.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"device '{device}' is unknown; use auto, cpu, cuda or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"device '{device}' is not supported; use auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            built = "this torch has no CUDA" if torch.version.cuda is None else "no GPU is visible"
            raise UserError(f"device is {device}, but {built}; use device cpu or a machine with a GPU")
        if (chosen.index or 0) >= torch.cuda.device_count():
            raise UserError(f"device is {device}, but there are only {torch.cuda.device_count()} GPUs, from cuda:0 on")
    if dtype == "auto":
        return chosen, torch.bfloat16 if chosen.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise UserError(f"dtype '{dtype}' is unknown; use auto, {', '.join(DTYPES)}")
    return chosen, DTYPES[dtype]


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the dense peak of ``device`` at bf16/fp16 in FLOP/s; None for fp32 and for devices not listed."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _BF16_PEAK.items() if key in name.replace("-", " ").split()), None)


def available_memory() -> int | None:
    """Return the free bytes of CPU memory, or None if the system does not report them."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def send(tensor: Tensor, device: torch.device | str, non_blocking: bool) -> Tensor:
    """Copy a CPU tensor to ``device``, through page-locked memory if the host must not wait for the GPU."""
    if non_blocking and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=non_blocking)


def copy_to_host(values: Tensor) -> Callable[[], list[Any]]:
    """Start a copy of values (1-D) to the host; calling the result waits for this copy, not for work queued later."""
    if values.device.type != "cuda":
        return values.tolist
    here = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> list[Any]:
        arrived.synchronize()
        return here.tolist()

    return read


class Mark:
    """A point in the device's queue of work; on the CPU, which has no queue, a time of the host."""

    def __init__(self, device: torch.device) -> None:
        """Mark the end of the work queued so far."""
        self._host_s = time.perf_counter()
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()

    def seconds_since(self, earlier: Mark) -> float:
        """Return the seconds from ``earlier``, of the same device, to this mark; waits until the device reaches it."""
        if self._event is None or earlier._event is None:
            return self._host_s - earlier._host_s
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3
