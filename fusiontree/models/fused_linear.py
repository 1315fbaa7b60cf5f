"""Projections of the same input, fused into one operation where their weights are available together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fusiontree.ops.linear import linears


def project(
    x_BSC: Tensor,
    modules: Sequence[nn.Module],
    *,
    joint: bool,
    cuts: Sequence[Callable[[int], list[int]] | None] | None = None,
) -> tuple[Tensor, ...]:
    """Apply every module to ``x``.

    Args:
        x_BSC: input of every module.
        modules: linear maps; a parallel plan may have replaced some by modules of another type.
        joint: True to read the weights without calling the modules. Must be False for engines that gather a module's
            parameters only during that module's forward.
        cuts: for each module None, or a function from the number of outputs to the sizes to split them into; a joint
            product then returns these parts in place of the full output.
    """
    weights: list[Tensor] = [m.weight for m in modules if type(m) is nn.Linear and m.bias is None]  # type: ignore[misc]
    # A weight that is currently sharded is not a plain nn.Parameter.
    plain = len(weights) == len(modules) and all(type(weight) is nn.Parameter for weight in weights)
    if not joint or not plain or torch.is_autocast_enabled(x_BSC.device.type):
        return tuple(module(x_BSC) for module in modules)
    splits = [
        cut(weight.shape[0]) if cut else [weight.shape[0]]
        for weight, cut in zip(weights, cuts or [None] * len(weights), strict=True)
    ]
    return linears(x_BSC, weights, splits)
