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
from fusiontree.ops.linear.side_by_side import is_plain


def project(
    x_BSC: Tensor,
    modules: Sequence[nn.Module],
    *,
    joint: bool,
    cuts: Sequence[Callable[[int], list[int]] | None] | None = None,
    passes: bool = False,
) -> tuple[Tensor, ...]:
    """Apply every module to ``x``.

    Args:
        x_BSC: input of every module.
        modules: linear maps; a parallel plan may have replaced some by modules of another type.
        joint: True to read the weights without calling the modules. Must be False for engines that gather a module's
            parameters only during that module's forward.
        cuts: for each module None, or a function from the number of outputs to the sizes to split them into; a joint
            product then returns these parts in place of the full output.
        passes: also return ``x``, as the last result, for further use by one operation that computes a new gradient:
            the backward pass may overwrite that gradient.
    """
    kinds = (nn.Linear, Fp8Linear)
    weights: list[Tensor] = [m.weight for m in modules if type(m) in kinds and m.bias is None]  # type: ignore[misc]
    # A weight that is currently sharded is not a plain nn.Parameter.
    plain = len(weights) == len(modules) and {type(weight) for weight in weights} == {nn.Parameter}
    if not joint or not plain or torch.is_autocast_enabled(x_BSC.device.type):
        return *(module(x_BSC) for module in modules), *((x_BSC,) if passes else ())
    splits = [
        cut(weight.shape[0]) if cut else [weight.shape[0]]
        for weight, cut in zip(weights, cuts or [None] * len(weights), strict=True)
    ]
    products = [module.product if isinstance(module, Fp8Linear) else None for module in modules]
    first = next((product for product in products if product is not None), None)
    if first is None:
        return linears(x_BSC, weights, splits, passes=passes)
    outputs = [
        Outputs(tuple(sizes), len(sizes)) if product is None else product.outputs(sizes)
        for product, sizes in zip(products, splits, strict=True)
    ]
    keeps = all(product.kept for product in products if product is not None)
    kept = first.kept if keeps else None
    results = fp8_linears(x_BSC, weights, outputs, first.recipe, kept, first.guesses)
    return (*results, x_BSC) if passes else results


def add_product(sum_BSD: Tensor, x_BSC: Tensor, module: nn.Module, *, joint: bool) -> Tensor:
    """Return ``sum + module(x)``; may overwrite ``sum``, which must be of no further use.

    If ``module`` is a linear map without bias, the matrix product adds to the memory of ``sum``.

    Args:
        sum_BSD: result of a matrix product.
        x_BSC: input of the module.
        module: linear map; a parallel plan may have replaced it by a module of another type.
        joint: as in :func:`project`.
    """
    if not joint or not is_plain(module) or torch.is_autocast_enabled(x_BSC.device.type):
        return sum_BSD + module(x_BSC)
    return _AddProduct.apply(sum_BSD, x_BSC, module.weight)


class _AddProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sum_BSD: Tensor, x_BSC: Tensor, weight_DC: Tensor) -> Tensor:
        ctx.save_for_backward(x_BSC, weight_DC)
        # Without mark_dirty, which refuses a view: the caller does not use the old values.
        out_BSD = sum_BSD.detach()
        out_BSD.view(-1, out_BSD.shape[-1]).addmm_(x_BSC.flatten(0, -2), weight_DC.t())
        return out_BSD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_BSC, weight_DC = ctx.saved_tensors
        g_ND = grads[0].flatten(0, -2)
        return grads[0], (g_ND @ weight_DC).view(x_BSC.shape), g_ND.t() @ x_BSC.flatten(0, -2)


def linears(
    x_BSC: Tensor, weights_DC: Sequence[Tensor], splits: Sequence[Sequence[int]], *, passes: bool = False
) -> tuple[Tensor, ...]:
    """Return the products of ``x`` with every weight, each split into the given numbers of output channels.

    Equal to :func:`fusiontree.ops.linear.reference.linears`. In the backward pass, the matrix products accumulate the
    gradient of ``x``, so no separate addition reads memory; and the weight gradient of a split output is computed part
    by part, without concatenation.

    Args:
        x_BSC: input.
        weights_DC: one matrix per product.
        splits: for each weight, the sizes to split its output channels into.
        passes: also return ``x``, as the last result, for further use. The products accumulate onto the gradient of
            that use and overwrite it: the using operation must compute a new tensor as its gradient.
    """
    rows = tuple(map(tuple, splits))
    for weight, sizes in zip(weights_DC, rows, strict=True):
        assert sum(sizes) == weight.shape[0], f"{weight.shape[0]} output channels split into {sizes}"
    return _Linears.apply(x_BSC, rows, passes, *weights_DC)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BSC: Tensor, splits: tuple[tuple[int, ...], ...], passes: bool, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        x_NC = x_BSC.flatten(0, -2)
        outputs = [
            (x_NC @ part.t()).view(*x_BSC.shape[:-1], part.shape[0])
            for weight, sizes in zip(weights, splits, strict=True)
            for part in (weight.split(sizes) if len(sizes) > 1 else (weight,))
        ]
        ctx.save_for_backward(x_BSC, *weights)
        ctx.splits = splits
        ctx.set_materialize_grads(False)
        return (*outputs, x_BSC) if passes else tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x_BSC, *saved = ctx.saved_tensors
        x_NC = x_BSC.flatten(0, -2)
        pending = list(grads)
        dx_NC = None
        if len(pending) > sum(map(len, ctx.splits)) and (passed := pending.pop()) is not None:
            dx_NC = passed.contiguous().flatten(0, -2)
        dweights: list[Tensor | None] = []
        for weight, sizes in zip(saved, ctx.splits, strict=True):
            parts, pending = pending[: len(sizes)], pending[len(sizes) :]
            first = parts[0]
            if first is None and not any(part is not None for part in parts):
                dweights.append(None)
                continue
            if first is not None and len(sizes) == 1:  # splits into one part would cost the host views
                g_ND = first.flatten(0, -2)
                dweights.append(g_ND.t() @ x_NC)
                dx_NC = g_ND @ weight if dx_NC is None else dx_NC.addmm_(g_ND, weight)
                continue
            dweight = torch.empty_like(weight)
            for part, rows, drows in zip(parts, weight.split(sizes), dweight.split(sizes), strict=True):
                if part is None:
                    drows.zero_()
                    continue
                g_ND = part.flatten(0, -2)
                torch.mm(g_ND.t(), x_NC, out=drows)
                dx_NC = g_ND @ rows if dx_NC is None else dx_NC.addmm_(g_ND, rows)
            dweights.append(dweight)
        return None if dx_NC is None else dx_NC.view(x_BSC.shape), None, None, *dweights
