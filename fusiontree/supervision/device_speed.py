"""Measures the speed of this process's device, without other ranks."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_SIDE = {"cuda": 4096, "cpu": 256}
_COPY_BYTES = {"cuda": 1 << 28, "cpu": 1 << 24}


class Probe:
    """A small fixed piece of work, timed; its tensors are made once."""

    def __init__(self, device: torch.device) -> None:
        """Allocate: 64 MiB on a GPU for the product, 512 MiB while the copy is measured."""
        self.device = device
        self.side = _SIDE.get(device.type, 256)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator().manual_seed(0)
        self._matrix = torch.rand(self.side, self.side, generator=generator).to(device, dtype)

    def matmul_s(self, repeats: int = 3) -> float:
        """Return the seconds of the fastest of some matrix products: other work on the host disturbs it least."""
        return self._fastest(lambda: torch.matmul(self._matrix, self._matrix), repeats)

    def matmul_flops(self, repeats: int = 5) -> float:
        """Return the rate of matrix products in FLOP/s (bf16 on a GPU, fp32 on a CPU)."""
        self.matmul_s(2)  # the first calls load libraries and raise clocks
        return 2 * self.side**3 / self.matmul_s(repeats)

    def copy_bytes_per_s(self, repeats: int = 5) -> float:
        """Return the memory's bandwidth, reads and writes counted."""
        size = _COPY_BYTES.get(self.device.type, 1 << 24)
        source = torch.zeros(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        self._fastest(lambda: target.copy_(source), 1)
        return 2 * size / self._fastest(lambda: target.copy_(source), repeats)

    def _fastest(self, work: Callable[[], object], repeats: int) -> float:
        best = float("inf")
        for _ in range(repeats):
            self._wait()
            began = time.perf_counter()
            work()
            self._wait()
            best = min(best, time.perf_counter() - began)
        return best

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
