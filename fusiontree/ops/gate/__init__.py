"""Mixing two branches by a gate."""

from __future__ import annotations

from torch import Tensor

from fusiontree.ops.elementwise import fused
from fusiontree.ops.gate import reference


def gate_mix(g: Tensor, m: Tensor, a: Tensor, *, backend: str = "auto") -> Tensor:
    """Return g m + (1 - g) a elementwise."""
    return fused(reference.gate_mix, backend, g.device.type)(g, m, a)
