"""Layer metric ``branch_rms``: the root mean square of each branch's output. docs/extend/metric.md explains it."""

from __future__ import annotations

import math

from torch import Tensor

from fusiontree.utils.layer_metrics import LAYER_METRICS, LayerMetric


def sum_squares(branches_BSC: dict[str, Tensor], counted_BS: Tensor | None) -> dict[str, Tensor]:
    """Return the sum of squares of each branch over a row's tokens and channels, ``[B]`` by branch."""
    sums = {}
    for name, output_BSC in branches_BSC.items():
        squares_BS = output_BSC.float().square().sum(-1)
        if counted_BS is not None:
            squares_BS = squares_BS * counted_BS
        sums[name] = squares_BS.sum(-1)
    return sums


def root(means: dict[str, float]) -> dict[str, float]:
    """Return the root of each branch's mean square."""
    return {name: math.sqrt(mean) for name, mean in means.items()}


LAYER_METRICS.register("branch_rms", LayerMetric(sum_squares, root))
