"""Several linear maps of one input; the matrix products of the backward pass accumulate the input's gradient.

Shape legend: B rows, S tokens, C input channels, D output channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusiontree.ops.fp8 import Outputs, fp8_linears
from fusiontree.ops.fp8.linear import Fp8Linear


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
    kinds = (nn.Linear, Fp8Linear)
    weights: list[Tensor] = [m.weight for m in modules if type(m) in kinds and m.bias is None]  # type: ignore[misc]
    # A weight that is currently sharded is not a plain nn.Parameter.
    plain = len(weights) == len(modules) and all(type(weight) is nn.Parameter for weight in weights)
    if not joint or not plain or torch.is_autocast_enabled(x_BSC.device.type):
        return tuple(module(x_BSC) for module in modules)
    splits = [
        cut(weight.shape[0]) if cut else [weight.shape[0]]
        for weight, cut in zip(weights, cuts or [None] * len(weights), strict=True)
    ]
    products = [module.product if isinstance(module, Fp8Linear) else None for module in modules]
    first = next((product for product in products if product is not None), None)
    if first is None:
        return linears(x_BSC, weights, splits)
    outputs = [
        Outputs(tuple(sizes), len(sizes)) if product is None else product.outputs(sizes)
        for product, sizes in zip(products, splits, strict=True)
    ]
    keeps = all(product.kept for product in products if product is not None)
    return fp8_linears(x_BSC, weights, outputs, first.recipe, first.kept if keeps else None, first.guesses)


def linears(x_BSC: Tensor, weights_DC: Sequence[Tensor], splits: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """Return the products of ``x`` with every weight, each split into the given numbers of output channels.

    Equal to :func:`fusiontree.ops.linear.reference.linears`. In the backward pass, the matrix products accumulate the
    gradient of ``x``, so no separate addition reads memory; and the weight gradient of a split output is computed part
    by part, without concatenation.

    Args:
        x_BSC: input.
        weights_DC: one matrix per product.
        splits: for each weight, the sizes to split its output channels into.
    """
    rows = tuple(map(tuple, splits))
    for weight, sizes in zip(weights_DC, rows, strict=True):
        assert sum(sizes) == weight.shape[0], f"{weight.shape[0]} output channels split into {sizes}"
    return _Linears.apply(x_BSC, rows, *weights_DC)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSC: Tensor, splits: tuple[tuple[int, ...], ...], *weights: Tensor) -> tuple[Tensor, ...]:
        x_NC = x_BSC.flatten(0, -2)
        outputs = [
            (x_NC @ part.t()).view(*x_BSC.shape[:-1], part.shape[0])
            for weight, sizes in zip(weights, splits, strict=True)
            for part in (weight.split(sizes) if len(sizes) > 1 else (weight,))
        ]
        ctx.save_for_backward(x_BSC, *weights)
        ctx.splits = splits
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x_BSC, *saved = ctx.saved_tensors
        x_NC = x_BSC.flatten(0, -2)
        pending = list(grads)
        dx_NC = None
        dweights: list[Tensor | None] = []
        for weight, sizes in zip(saved, ctx.splits, strict=True):
            parts, pending = pending[: len(sizes)], pending[len(sizes) :]
            if parts[0] is None and not any(part is not None for part in parts):
                dweights.append(None)
                continue
            dweight = torch.empty_like(weight)
            whole = len(sizes) == 1  # a split into one part would cost the host a view
            weights = (weight,) if whole else weight.split(sizes)
            for part, rows, drows in zip(parts, weights, (dweight,) if whole else dweight.split(sizes), strict=True):
                if part is None:
                    drows.zero_()
                    continue
                g_ND = part.flatten(0, -2)
                torch.mm(g_ND.t(), x_NC, out=drows)
                dx_NC = g_ND @ rows if dx_NC is None else dx_NC.addmm_(g_ND, rows)
            dweights.append(dweight)
        return None if dx_NC is None else dx_NC.view(x_BSC.shape), None, *dweights
