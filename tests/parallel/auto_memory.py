"""A device memory of a chosen size for ``activation_checkpointing: auto``; real memory would fit every tiny model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from fusiontree.parallel import auto_checkpointing
from fusiontree.parallel.auto_checkpointing import CpuMemory
from fusiontree.parallel.recompute_mix import peak_bytes


class PartialMemory(CpuMemory):
    """Lets tensors fill a share of the way from what full recomputation needs to what none needs.

    The budget is known only when the layers are measured, so it is subtracted from the peak.
    """

    def __init__(self, share: float) -> None:
        super().__init__(1.0, 1)
        self.share = share

    def budget(self) -> float:
        return 0.0

    def peak(self, nbytes: Sequence[dict[str, float]], modes: Sequence[str]) -> float:
        full, none = (peak_bytes(nbytes, [mode] * len(nbytes)) for mode in ("full", "none"))
        return super().peak(nbytes, modes) - full - self.share * (none - full)


@contextmanager
def partial_memory(share: float) -> Iterator[None]:
    """Let every rank have the memory of :class:`PartialMemory`; ranks after the first have more."""

    def memory(layout: Any, limit: float) -> PartialMemory:
        return PartialMemory(share + 0.3 * layout.place.rank)

    with patch.object(auto_checkpointing, "device_memory", memory):
        yield
