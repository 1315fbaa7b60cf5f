"""Linear maps of one input, as one operation where their weights may be read together."""

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
        x_BSC: their input.
        modules: linear maps; a parallel plan may have put others in their place.
        joint: whether this forward may read the modules' weights itself. An engine that gathers a module's
            parameters for the module's own forward alone leaves it False.
        cuts: for each module None, or how its number of outputs may be cut; a joint product then returns the parts
            in the whole's place.
    """
    weights: list[Tensor] = [m.weight for m in modules if type(m) is nn.Linear and m.bias is None]  # type: ignore[misc]
    # A weight that is sharded at this moment is not a plain parameter.
    plain = len(weights) == len(modules) and all(type(weight) is nn.Parameter for weight in weights)
    if not joint or not plain or torch.is_autocast_enabled(x_BSC.device.type):
        return tuple(module(x_BSC) for module in modules)
    splits = [
        cut(weight.shape[0]) if cut else [weight.shape[0]]
        for weight, cut in zip(weights, cuts or [None] * len(weights), strict=True)
    ]
    return linears(x_BSC, weights, splits)
