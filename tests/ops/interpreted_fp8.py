"""The FP8 cast kernels by Triton's interpreter, each result beside the reference's.

``TRITON_INTERPRET=1 python -m tests.ops.interpreted_fp8`` prints one line a result: name, share that differs, bar.
"""

from __future__ import annotations

from unittest.mock import patch

import torch
from torch import Tensor

from fusiontree.ops.fp8 import casts, triton

_g = torch.Generator().manual_seed(0)


def draw(rows: int, columns: int) -> Tensor:
    """Values with outlier rows and channels that both FP8 types hold: the interpreter does not round as a GPU does."""

    def powers(*shape: int) -> Tensor:
        return torch.exp2(-torch.randint(0, 4, shape, generator=_g).float())

    quarters = torch.randint(4, 8, (rows, columns), generator=_g) / 4
    signs = torch.randint(0, 2, (rows, columns), generator=_g) * 2 - 1
    return (quarters * signs * powers(rows, columns) * powers(rows, 1) * powers(columns)).bfloat16()


def different(got: Tensor, want: Tensor) -> float:
    """Share of elements whose bits differ; a NaN equals another."""
    assert got.shape == want.shape and got.dtype == want.dtype
    mine, theirs = got.float(), want.float()
    if got.dtype != torch.float32 and theirs.isnan().any():
        return 0.0  # the interpreter has no NaN in FP8; the inverse scales make the product NaN
    return 1.0 - float(((mine == theirs) | (mine.isnan() & theirs.isnan())).float().mean())


def compare(name: str, parts: list[Tensor], scaling: casts.Scaling, dtype: torch.dtype, dim: int) -> None:
    def run() -> list[Tensor]:
        found = casts.greatest(parts, scaling, dim)
        rows, columns = casts.cast_both(parts, found, dtype, dim)
        single = (casts.cast_rows(parts, found, dtype, dim), casts.cast_columns(parts, found, dtype, dim))
        return [*found, *rows, *columns, *single[0], *single[1]]

    want = run()
    with patch.object(casts._KERNELS, "choose", lambda wanted, device: triton.KERNELS):
        got = run()
    for index, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        print(f"{name} {index} {different(mine, theirs):.2e} 1e-09", flush=True)


def main() -> None:
    with_nan, with_inf, zeros = draw(70, 150), draw(70, 150), torch.zeros(70, 150, dtype=torch.bfloat16)
    with_nan[3, 5], with_inf[64, 149] = -torch.nan, -torch.inf
    extreme = torch.tensor([[2.0**-120, 0.0], [2.0**127, 448.0]]).bfloat16()
    for scaling, dtype in (("tensor", casts.E4M3), ("row", casts.E4M3), ("row", casts.E5M2)):
        kind = f"{scaling} {dtype}".replace("torch.float8_", "")
        compare(f"{kind} side by side", [draw(70, 150), draw(70, 33)], scaling, dtype, 1)
        compare(f"{kind} one above the other", [draw(48, 64), draw(96, 64)], scaling, dtype, 0)
        compare(f"{kind} a transposed view", [draw(33, 70).t()], scaling, dtype, 1)
        for name, matrix in (("nan", with_nan), ("inf", with_inf), ("zeros", zeros), ("extremes", extreme)):
            compare(f"{kind} {name}", [matrix], scaling, dtype, 1)


if __name__ == "__main__":
    main()
