"""The modules whose products are computed in FP8."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fusiontree.ops.fp8 import Guesses, KeptCasts, Outputs, Recipe, fp8_linears


class Fp8Product:
    """How a linear map is computed in FP8."""

    def __init__(self, recipe: Recipe, bf16_rows: Callable[[int], int] = lambda rows: 0) -> None:
        """Keep no casts of the weight.

        Args:
            recipe: scaling and types.
            bf16_rows: returns how many of the last output channels stay bf16, given the number of all.
        """
        self.recipe, self.bf16_rows = recipe, bf16_rows
        self.guesses = Guesses()
        self.kept: KeptCasts | None = None
        """Set by an engine: casts are kept for the micro-batches of a step."""

    def outputs(self, sizes: list[int]) -> Outputs:
        """Return the outputs of a weight whose rows are split into ``sizes``.

        Rows that stay bf16 must be the last part or parts.
        """
        bf16 = self.bf16_rows(sum(sizes))
        parts = 0
        while bf16 > sum(sizes[len(sizes) - parts :]):
            parts += 1
        assert bf16 == sum(sizes[len(sizes) - parts :]), f"{bf16} rows in bf16 are not the last parts of {sizes}"
        return Outputs(tuple(sizes), parts)

    def __call__(self, x_BSC: Tensor, weight_DC: Tensor) -> Tensor:
        """Return the product of ``x`` and a weight."""
        bf16 = self.bf16_rows(weight_DC.shape[0])
        sizes = [weight_DC.shape[0] - bf16, bf16] if bf16 else [weight_DC.shape[0]]
        parts = fp8_linears(x_BSC, [weight_DC], [self.outputs(sizes)], self.recipe, self.kept, self.guesses)
        return torch.cat(parts, dim=-1) if bf16 else parts[0]


class Fp8Linear(nn.Linear):
    """A linear map without bias, computed in FP8."""

    def __init__(self, whole: nn.Linear, product: Fp8Product) -> None:
        super().__init__(whole.in_features, whole.out_features, bias=False, device="meta")
        self.weight = whole.weight
        self.product = product

    def forward(self, x_BSC: Tensor) -> Tensor:
        """Return the outputs."""
        return self.product(x_BSC, self.weight)
