"""Several linear maps of one input, as separate products."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def linears(x_BSC: Tensor, weights_DC: Sequence[Tensor], splits: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """Compute :func:`fusiontree.ops.linear.linears`."""
    outputs: list[Tensor] = []
    for weight, sizes in zip(weights_DC, splits, strict=True):
        outputs += F.linear(x_BSC, weight).split(list(sizes), dim=-1)
    return tuple(outputs)
