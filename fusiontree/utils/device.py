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


def choose_device(wanted: str, local_rank: int = 0, option: str = "--device") -> torch.device:
    """Return the device that this process computes on.

    Args:
        wanted: auto (a GPU if there is one), cpu, cuda (the GPU with the number ``local_rank``) or cuda:N.
        local_rank: number of this process among the processes of its node.
        option: option or setting of ``wanted``, which errors name.

    Raises:
        UserError: the name is unknown, there is no GPU, or there are too few GPUs.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise UserError(f"device '{wanted}' is unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device '{wanted}' is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    cpu = f"use {option}{'=' if '.' in option else ' '}cpu"
    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = f"this torch ({torch.__version__}) is built without CUDA" if built is None else "no GPU is visible"
        raise UserError(f"{option} is {wanted}, but {reason}; {cpu} or a machine with a GPU")
    count = torch.cuda.device_count()
    index, way_out = local_rank, f"start at most {count} processes per node"
    if device.index is not None:
        index, way_out = device.index, f"use cuda:0 to cuda:{count - 1}"
    if index >= count:
        raise UserError(
            f"{option} is {wanted}, but cuda:{index} is absent: this machine shows {count} GPUs; {way_out}, or {cpu}"
        )
    return torch.device("cuda", index)


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Return the dtype of weights on ``device``: for auto bfloat16 on a GPU and float32 on a CPU, else of that name.

    Raises:
        UserError: the name is unknown.
    """
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if wanted not in DTYPES:
        raise UserError(f"dtype '{wanted}' is unknown; use auto, {', '.join(DTYPES)}")
    return DTYPES[wanted]


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
