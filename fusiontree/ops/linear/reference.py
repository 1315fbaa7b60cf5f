"""Several linear maps of one input, as separate products."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def add_product(sum_BSD: Tensor, x_BSC: Tensor, module: nn.Module) -> Tensor:
    """Compute :func:`fusiontree.ops.linear.add_product`."""
    product_BSD: Tensor = module(x_BSC)
    return sum_BSD + product_BSD


def linears(x_BSC: Tensor, weights_DC: Sequence[Tensor], splits: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """Compute :func:`fusiontree.ops.linear.linears`."""
    outputs: list[Tensor] = []
    for weight, sizes in zip(weights_DC, splits, strict=True):
        outputs += F.linear(x_BSC, weight).split(list(sizes), dim=-1)
    return tuple(outputs)
