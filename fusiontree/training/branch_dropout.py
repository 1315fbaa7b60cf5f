"""Which branches are dropped: a function of seed, step, row and layer, so every layout drops the same ones.

Shape legend: L layers, B rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusiontree.utils.hashing import stable_uniform


def branch_scale(rows: list[int], *, layers: int, probability: float, seed: int, step: int) -> Tensor | None:
    """Return the factors ``[L, B, 2]`` of the (first, second) branch outputs, or None if nothing can be dropped.

    A row loses one branch of a layer with ``probability``, either one equally often, never both. The factor is 0 or
    1; the other branch is not rescaled, since the gate mixes rather than sums.

    Args:
        rows: global numbers of the batch's rows.
        layers: number of blocks.
        probability: chance of a drop for each row and layer.
        seed: the run's seed.
        step: optimizer step.
    """
    if not probability:
        return None
    scale_LB2 = torch.ones(layers, len(rows), 2)
    for layer in range(layers):
        for index, row in enumerate(rows):
            draw = stable_uniform("branch_dropout", seed, step, row, layer)
            if draw < probability:
                scale_LB2[layer, index, 0 if draw < probability / 2 else 1] = 0.0
    return scale_LB2
