"""The one device that a program without peers computes on; values on their way to and from it; moments in its work."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusiontree.utils.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Resolve ``--device`` and ``--dtype``.

    Args:
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        dtype: auto (bfloat16 on a GPU, float32 on a CPU) or a name in ``DTYPES``.

    Raises:
        UserError: no such device here, or no such dtype.
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


def send(tensor: Tensor, device: torch.device | str, non_blocking: bool) -> Tensor:
    """Copy a tensor of the CPU to ``device``; a copy that must not wait for the GPU begins in page-locked memory."""
    if non_blocking and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=non_blocking)


def copy_to_host(values: Tensor) -> Callable[[], list[Any]]:
    """Begin to bring values (1-D) to the host; the result waits for them, and for nothing that is queued after them."""
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
    """A moment in the device's work; on the CPU, where work is done when it is called for, in the host's."""

    def __init__(self, device: torch.device) -> None:
        """Mark the end of what the device was given so far."""
        self._host_s = time.perf_counter()
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()

    def seconds_since(self, earlier: Mark) -> float:
        """Return the seconds from ``earlier``, of the same device, to here; waits for the device to get here."""
        if self._event is None or earlier._event is None:
            return self._host_s - earlier._host_s
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3
