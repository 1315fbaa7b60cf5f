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
    report(name, got, want)


def report(name: str, got: list[Tensor], want: list[Tensor]) -> None:
    for index, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        print(f"{name} {index} {different(mine, theirs):.2e} 1e-09", flush=True)


def compare_guesses(name: str, parts: list[Tensor], dtype: torch.dtype, dim: int, kept: casts.Guess) -> None:
    """Casts by a wrong guess, by a right one, and by one from other values; ``kept`` starts with other values."""
    greater = [part * 8 for part in parts]
    for case, matrices, wrong in (("wrong", parts, 1), ("right", parts, 0), ("of smaller values", greater, 1)):
        found = casts.greatest(matrices, "tensor", dim)
        want = [*found, *casts.cast_rows(matrices, found, dtype, dim), *casts.cast_columns(matrices, found, dtype, dim)]
        before = kept.wrong
        with patch.object(casts._KERNELS, "choose", lambda wanted, device: triton.KERNELS):
            amax, rows, columns = casts.find_and_cast(matrices, "tensor", dtype, dim, both=True, guess=kept)
            alone = casts.find_and_cast(matrices, "tensor", dtype, dim, both=False, guess=kept)
        assert columns is not None and alone[2] is None
        report(f"{name}, guess {case}", [*amax, *rows, *columns], want)
        report(f"{name}, guess {case}, cast alone", [*alone[0], *alone[1]], [*found, *want[2:4]])
        wrongs = [torch.tensor([float(kept.wrong - before)]), torch.tensor([wrong * len(parts)]).float()]
        report(f"{name}, guess {case}, number of wrong guesses", wrongs[:1], wrongs[1:])


def right_guesses_are_not_repaired() -> None:
    """A repair after a right guess leaves what it finds."""
    matrix, kept = draw(70, 150), casts.Guess()
    with patch.object(casts._KERNELS, "choose", lambda wanted, device: triton.KERNELS):
        for _ in range(2):
            found, rows, columns = casts.find_and_cast([matrix], "tensor", casts.E4M3, 0, both=True, guess=kept)
    assert columns is not None
    marked = [rows.values_RK.zero_().clone(), columns.values_RK.zero_().clone()]
    windows = next(iter(casts._windows([matrix], found, 0, rows, columns)))
    bits = torch.cat([found.rows, found.rows]).view(torch.int32)
    triton.repair(windows[0], casts.E4M3, windows[1], windows[2], bits, kept.on(matrix.device))
    report("nothing to repair", [rows.values_RK, columns.values_RK], marked)


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
    for dtype in (casts.E4M3, casts.E5M2):
        kept = casts.Guess()
        compare_guesses(f"{dtype}".replace("torch.float8_", ""), [draw(70, 150)], dtype, 1, kept)
        compare_guesses("other values", [draw(70, 150) / 64], dtype, 1, kept)
    compare_guesses("side by side", [draw(70, 150), draw(70, 33)], casts.E4M3, 1, casts.Guess())
    for name, matrix in (("nan", with_nan), ("inf", with_inf), ("zeros", zeros)):
        kept = casts.Guess()
        with patch.object(casts._KERNELS, "choose", lambda wanted, device: triton.KERNELS):
            for _ in range(2):
                got = casts.find_and_cast([matrix], "tensor", casts.E4M3, 0, both=True, guess=kept)
            after = casts.find_and_cast([with_nan.nan_to_num()], "tensor", casts.E4M3, 0, both=True, guess=kept)
        for case, mine, source in (("guess", got, matrix), ("finite after it", after, with_nan.nan_to_num())):
            found = casts.greatest([source], "tensor", 0)
            want = [*found, *casts.cast_rows([source], found, casts.E4M3, 0)]
            report(f"{name} {case}", [*mine[0], *mine[1]], want)
    right_guesses_are_not_repaired()


if __name__ == "__main__":
    main()
