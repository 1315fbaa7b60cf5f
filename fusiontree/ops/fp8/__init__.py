"""Linear maps of one input whose matrix products are computed in FP8; gradients too.

Shape legend: B rows, S tokens, N tokens of the batch, C input channels, D output channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusiontree.ops.fp8.casts import (
    E4M3,
    Cast,
    Greatest,
    Guess,
    Recipe,
    cast_columns,
    find_and_cast,
    part_of,
    product,
)

__all__ = ["E4M3", "Guesses", "KeptCasts", "Outputs", "Recipe", "fp8_linears"]

FAST = {"output": True, "input gradient": False, "weight gradient": False}
"""Products that sum up in the tensor cores' own registers; the weight gradient sums over all tokens."""


class Outputs(NamedTuple):
    """The outputs of one weight."""

    sizes: tuple[int, ...]
    """Output channels of each part."""
    bf16: int = 0
    """Number of parts, the last ones, that are computed in bf16."""

    @property
    def fp8_rows(self) -> int:
        """Output channels that are computed in FP8."""
        return sum(self.sizes[: len(self.sizes) - self.bf16])


class Guesses:
    """Guesses of the scales of a product's three matrices; results do not depend on them."""

    def __init__(self) -> None:
        """Guess nothing yet."""
        self.input, self.weight, self.gradient = Guess(), Guess(), Guess()


class KeptCasts:
    """The casts of weights for the micro-batches of a step, in memory that stays: a recorded step reads it."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self.valid = False
        """Whether the weights have not changed since the casts were made."""
        self._both: tuple[Cast, Cast] | None = None
        self._guess = Guess()

    def of(self, weights: Sequence[Tensor], recipe: Recipe) -> tuple[Cast, Cast]:
        """Return the casts of the weights one above the other, as they are and transposed."""
        if self.valid and self._both is not None:
            return self._both
        _, rows, columns = find_and_cast(
            weights, recipe.scaling, E4M3, 0, both=True, guess=self._guess, into=self._both
        )
        assert columns is not None
        self._both, self.valid = (rows, columns), True
        return self._both


def fp8_linears(
    x_BSC: Tensor,
    weights_DC: Sequence[Tensor],
    outputs: Sequence[Outputs],
    recipe: Recipe,
    kept: KeptCasts | None = None,
    guesses: Guesses | None = None,
) -> tuple[Tensor, ...]:
    """Return the products of ``x`` with every weight, each split into its parts.

    The input is cast once, the weights of all FP8 parts together. The gradient of ``x`` is one product with all of
    them, and that of a weight one product. Only ``x`` itself is saved for the backward pass, which casts it again:
    activations take the same memory as in bf16.

    Args:
        x_BSC: input, bf16; its tokens are a multiple of 16 if a gradient is computed.
        weights_DC: one matrix per product, bf16; C and the rows of each FP8 part are multiples of 16.
        outputs: of each weight; at least one part is in FP8.
        recipe: scaling and types.
        kept: casts of the weights; None casts them whenever they are used.
        guesses: of the scales, updated; they save time and change no result. None: no guesses.
    """
    for weight, its in zip(weights_DC, outputs, strict=True):
        assert sum(its.sizes) == weight.shape[0], f"{weight.shape[0]} output channels split into {its.sizes}"
    return _Fp8Linears.apply(x_BSC, tuple(outputs), recipe, kept, guesses, *weights_DC)


def _fp8_parts(weights: Sequence[Tensor], outputs: Sequence[Outputs]) -> list[Tensor]:
    """Return the rows of the weights that are multiplied in FP8."""
    pairs = zip(weights, outputs, strict=True)
    return [weight[: its.fp8_rows] if its.bf16 else weight for weight, its in pairs if its.fp8_rows]


class _Fp8Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BSC: Tensor,
        outputs: tuple[Outputs, ...],
        recipe: Recipe,
        kept: KeptCasts | None,
        guesses: Guesses | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        x_NC = x_BSC.flatten(0, -2)
        x_amax, x_cast, _ = find_and_cast(
            [x_NC], recipe.scaling, E4M3, 0, both=False, guess=guesses.input if guesses else None
        )
        saved = [x_amax.columns]
        if kept is None:
            parts = _fp8_parts(weights, outputs)
            w_amax, w_cast, _ = find_and_cast(
                parts, recipe.scaling, E4M3, 0, both=False, guess=guesses.weight if guesses else None
            )
            saved.append(w_amax.columns)
        else:
            w_cast = kept.of(_fp8_parts(weights, outputs), recipe)[0]
        found, at = [], 0
        for weight, its in zip(weights, outputs, strict=True):
            fp8, row = len(its.sizes) - its.bf16, 0
            for index, size in enumerate(its.sizes):
                if index < fp8:
                    found.append(product(x_cast, part_of(w_cast, at, at + size), fast=FAST["output"]))
                    at += size
                else:
                    found.append(x_NC @ weight[row : row + size].t())
                row += size
        ctx.save_for_backward(x_BSC, *weights, *saved)
        ctx.outputs, ctx.recipe, ctx.kept, ctx.guess = outputs, recipe, kept, guesses.gradient if guesses else None
        ctx.set_materialize_grads(False)
        return tuple(y_ND.view(*x_BSC.shape[:-1], -1) for y_ND in found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        outputs, recipe = ctx.outputs, ctx.recipe
        x_BSC, *rest = ctx.saved_tensors
        weights, amax = rest[: len(outputs)], rest[len(outputs) :]
        x_NC = x_BSC.flatten(0, -2)
        fp8, bf16 = _by_precision(x_NC, grads, outputs)
        dx_NC = g_columns = None
        if fp8:
            _, g_rows, g_columns = find_and_cast(fp8, recipe.scaling, recipe.gradient, 1, both=True, guess=ctx.guess)
            if ctx.kept is None:
                w_columns = cast_columns(_fp8_parts(weights, outputs), Greatest(amax[1], amax[1]), E4M3, 0)
            else:
                w_columns = ctx.kept.of(_fp8_parts(weights, outputs), recipe)[1]
            dx_NC = product(g_rows, w_columns, fast=FAST["input gradient"])
            x_columns = cast_columns([x_NC], Greatest(amax[0], amax[0]), E4M3, 0)
        dweights: list[Tensor | None] = []
        at = 0
        for weight, its, plain in zip(weights, outputs, bf16, strict=True):
            if not fp8 and all(part is None for part in plain):
                dweights.append(None)
                continue
            rows = its.fp8_rows
            dweight = torch.empty_like(weight)
            if rows and g_columns is not None:
                product(part_of(g_columns, at, at + rows), x_columns, fast=FAST["weight gradient"], out=dweight[:rows])
            else:
                dweight[:rows].zero_()
            at += rows
            for size, part in zip(its.sizes[len(its.sizes) - its.bf16 :], plain, strict=True):
                if part is None:
                    dweight[rows : rows + size].zero_()
                else:
                    torch.mm(part.t(), x_NC, out=dweight[rows : rows + size])
                    its_weight = weight[rows : rows + size]
                    dx_NC = part @ its_weight if dx_NC is None else dx_NC.addmm_(part, its_weight)
                rows += size
            dweights.append(dweight)
        return None if dx_NC is None else dx_NC.view(x_BSC.shape), None, None, None, None, *dweights


def _by_precision(
    x_NC: Tensor, grads: Sequence[Tensor | None], outputs: Sequence[Outputs]
) -> tuple[list[Tensor], list[list[Tensor | None]]]:
    """Return the gradients of the FP8 parts, zeros where one is missing, and of each weight's bf16 parts.

    The first list is empty if no FP8 part has a gradient.
    """
    pending = [None if grad is None else grad.flatten(0, -2) for grad in grads]
    fp8: list[tuple[int, Tensor | None]] = []
    bf16 = []
    for its in outputs:
        first, pending = pending[: len(its.sizes)], pending[len(its.sizes) :]
        border = len(its.sizes) - its.bf16
        fp8 += zip(its.sizes[:border], first[:border], strict=True)
        bf16.append(first[border:])
    if all(grad is None for _, grad in fp8):
        return [], bf16
    zeros = [x_NC.new_zeros(x_NC.shape[0], size) if grad is None else grad for size, grad in fp8]
    return zeros, bf16
