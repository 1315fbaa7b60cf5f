"""FP8 on a GPU: casts equal the reference bit for bit, products equal its products; the speed of both is printed.

``pytest -s tests/gpu/test_fp8.py`` shows the table of speeds.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusiontree.ops import fp8
from fusiontree.ops.fp8 import Outputs, Recipe, casts, fp8_linears, reference
from fusiontree.ops.fp8.casts import E4M3, E5M2

_THERE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not _THERE, reason="no CUDA device with FP8")]

SCALINGS = pytest.mark.parametrize("scaling", ["tensor", "row"])
DTYPES = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
PRODUCTS = {
    "in_proj z, x": (2048, 8192),
    "q, k, v": (2048, 4096),
    "branch out_proj": (4096, 2048),
    "align up, skip": (4096, 4096),
    "out_proj": (2048, 2048),
    "mlp up": (2048, 4096),
    "mlp down": (4096, 2048),
}
"""Input and output channels of the products of hybrid_1b_32k."""
TOKENS = 32768


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Values with outlier channels and rows, and elements that become subnormal or zero; on the CPU."""
    g = torch.Generator().manual_seed(seed)
    matrix = torch.randn(*shape, generator=g) * torch.randn(shape[-1], generator=g).exp() ** 3
    return (matrix * torch.randn(*shape[:-1], 1, generator=g).exp() ** 2).bfloat16()


def same_bits(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    mine, theirs = (t.contiguous().cpu() for t in (got, want))
    if mine.dtype == torch.float32:
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
        return
    nan = theirs.float().isnan()
    assert torch.equal(mine.float().isnan(), nan)
    assert torch.equal(mine.view(torch.uint8)[~nan], theirs.view(torch.uint8)[~nan])


@SCALINGS
@DTYPES
def test_casts_equal_the_reference_bit_for_bit(scaling: casts.Scaling, dtype: torch.dtype) -> None:
    with_nan, with_inf = draw(70, 150, seed=3), draw(70, 150, seed=4)
    with_nan[3, 5], with_inf[64, 149] = torch.nan, -torch.inf
    zeros = torch.zeros(70, 150).bfloat16()
    extreme = torch.tensor([[1e-38, 0.0], [3e38, 448.0]]).bfloat16()
    cases = [([draw(300, 513), draw(300, 64, seed=1)], 1), ([draw(48, 256), draw(96, 256, seed=2)], 0)]
    cases += [([draw(33, 70).t()], 1), *(([matrix], 1) for matrix in (with_nan, with_inf, zeros, extreme))]
    for parts, dim in cases:
        found = []
        for device in ("cuda", "cpu"):
            here = [part.to(device) for part in parts]
            amax = casts.greatest(here, scaling, dim)
            rows, columns = casts.cast_both(here, amax, dtype, dim)
            alone = (casts.cast_rows(here, amax, dtype, dim), casts.cast_columns(here, amax, dtype, dim))
            found.append([*amax, *rows, *columns, *alone[0], *alone[1]])
        for mine, theirs in zip(*found, strict=True):
            same_bits(mine, theirs)


@DTYPES
def test_guessed_casts_equal_the_reference_bit_for_bit(dtype: torch.dtype) -> None:
    """After a wrong guess, a right one, and guesses from greater, smaller, zero and not finite values."""
    first, second = draw(300, 513), draw(300, 64, seed=1)
    spoiled = second.clone()
    spoiled[5, 7] = torch.nan
    guess = casts.Guess()
    repaired = []
    for scale in (1.0, 1.0, 64.0, 1e-6, 0.0, None, None, 1.0, 1.0):
        parts = [first * (scale or 1.0), spoiled] if scale is None else [first * scale, second * scale]
        here, before = [part.cuda() for part in parts], guess.wrong
        amax, rows, columns = casts.find_and_cast(here, "tensor", dtype, 1, both=True, guess=guess)
        repaired.append(guess.wrong > before)
        found = casts.greatest(parts, "tensor", 1)
        want = [*found, *casts.cast_rows(parts, found, dtype, 1), *casts.cast_columns(parts, found, dtype, 1)]
        assert columns is not None
        for mine, theirs in zip([*amax, *rows, *columns], want, strict=True):
            same_bits(mine, theirs)
    assert repaired == [True, False, True, True, True, True, False, True, False]


def test_guesses_serve_a_recorded_step() -> None:
    """A recording reads and writes the guess that eager calls left; other values are repaired in the replay."""
    guess, x = casts.Guess(), draw(256, 512).cuda()

    def compute() -> list[Tensor]:
        amax, rows, columns = casts.find_and_cast([x], "tensor", E4M3, 0, both=True, guess=guess)
        assert columns is not None
        return [*amax, *rows, *columns]

    compute()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = compute()
    for factor, wrong in ((1.0, 0), (16.0, 1), (1.0, 0), (2.0**-9, 1), (1.0, 0)):
        before = guess.wrong
        x *= factor
        graph.replay()
        assert guess.wrong - before == wrong
        here = x.cpu()
        found = casts.greatest([here], "tensor", 0)
        want = [*found, *casts.cast_rows([here], found, E4M3, 0), *casts.cast_columns([here], found, E4M3, 0)]
        for mine, theirs in zip(got, want, strict=True):
            same_bits(mine, theirs)


@SCALINGS
@DTYPES
@pytest.mark.parametrize("fast", [False, True])
def test_products_equal_those_of_the_reference(scaling: casts.Scaling, dtype: torch.dtype, fast: bool) -> None:
    """Sums of fp32 differ by their order alone; the tensor cores' own sums keep fewer bits."""
    for rows, contracted, columns in ((128, 256, 64), (1000, 4096, 2048), (4096, 32768, 512)):
        a, b = draw(rows, contracted).cuda(), draw(columns, contracted, seed=1).cuda()
        left = casts.cast_rows([a], casts.greatest([a], scaling, 0), dtype, 0)
        right = casts.cast_rows([b], casts.greatest([b], scaling, 0), E4M3, 0)
        got, want = casts.product(left, right, fast=fast), reference.product(left, right)
        assert got.dtype == torch.bfloat16 and got.shape == (rows, columns)
        error = float((got.float() - want.float()).norm() / want.float().norm())
        print(f"{scaling} {dtype} fast={fast} {rows} x {contracted} x {columns}: {error:.1e}")
        assert error < (2e-2 if fast else 2e-3)


@SCALINGS
@DTYPES
def test_linear_maps_equal_those_of_the_cpu(scaling: casts.Scaling, dtype: torch.dtype) -> None:
    outputs = [Outputs((256, 64, 8), 1), Outputs((128,)), Outputs((16,), 1)]
    weights = [draw(sum(its.sizes), 512, seed=index) for index, its in enumerate(outputs)]
    grads = [draw(2, 256, size, seed=9) * 1e-5 for its in outputs for size in its.sizes]
    found = []
    for device in ("cuda", "cpu"):
        leaves = [t.to(device).requires_grad_() for t in (draw(2, 256, 512, seed=8), *weights)]
        results = fp8_linears(leaves[0], leaves[1:], outputs, Recipe(scaling, dtype))
        torch.autograd.backward(results, [grad.to(device) for grad in grads])
        found.append([*results, *(leaf.grad for leaf in leaves)])
    for mine, theirs in zip(*found, strict=True):
        assert mine is not None and theirs is not None
        assert float((mine.cpu().float() - theirs.float()).norm() / theirs.float().norm()) < 5e-3


def test_a_nan_reaches_outputs_and_gradients() -> None:
    x, weight = draw(64, 256).cuda(), draw(128, 256, seed=1).cuda().requires_grad_()
    x[5, 7] = torch.nan
    leaf = x.clone().requires_grad_()
    (out,) = fp8_linears(leaf, [weight], [Outputs((128,))], Recipe())
    out.sum().backward()
    assert out.isnan().any() and weight.grad is not None and weight.grad.isnan().any()


def _ms(run: Callable[[], object]) -> float:
    """Least time of five batches of ten calls, in milliseconds."""
    run()
    best = float("inf")
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(10):
            run()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 10)
    return best


TILES = ((64, 128, 8), (128, 64, 8), (128, 64, 4), (128, 128, 8), (128, 128, 16))
"""Rows, columns and warps that are timed beside those in use."""


@pytest.mark.parametrize("channels", [2048, 4096, 8192])
def test_speed_of_the_casts(channels: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """GB/s of each kernel on 32,768 tokens, by the bytes that it must read and write; ms of whole casts."""
    from fusiontree.ops.fp8 import triton

    x = torch.randn(TOKENS, channels, device="cuda").bfloat16()
    amax, guess = casts.greatest([x], "tensor", 0), casts.Guess()
    rows, columns = casts.cast_both([x], amax, E4M3, 0)
    by_row = casts.greatest([x], "row", 0)
    rows_by_row, columns_by_row = casts.cast_both([x], by_row, E4M3, 0)
    bits = torch.zeros(2, dtype=torch.int32, device="cuda")
    _, target, turned = next(iter(casts._windows([x], amax, 0, rows, columns)))
    _, target_by_row, turned_by_row = next(iter(casts._windows([x], by_row, 0, rows_by_row, columns_by_row)))
    guessed = guess.on(x.device)

    def rate(size: int, run: Callable[[], object]) -> str:
        return f"{size * x.numel() / _ms(run) / 1e6:>8.0f}"

    def by_one_scale() -> str:
        rates = [rate(3, lambda: triton.write(x, E4M3, target, None))]
        rates += [rate(3, lambda: triton.write(x, E4M3, None, turned))]
        rates += [rate(4, lambda: triton.write(x, E4M3, target, turned))]
        rates += [rate(3, lambda: triton.guess(x, E4M3, target, None, bits, guessed))]
        rates += [rate(4, lambda: triton.guess(x, E4M3, target, turned, bits, guessed))]
        return "".join(rates)

    lines = [
        f"[{TOKENS}, {channels}], GB/s    rows columns    both  guess: rows, both",
        f"{'in use':<19}{by_one_scale()}",
    ]
    for height, width, warps in TILES:
        tile = {"ROWS": height, "COLUMNS": width, "num_warps": warps}
        monkeypatch.setattr(triton, "WRITE_ROWS", tile)
        monkeypatch.setattr(triton, "WRITE_COLUMNS", tile)
        lines.append(f"{f'{height} x {width}, {warps} warps':<19}{by_one_scale()}")
    monkeypatch.undo()
    finds = [rate(2, lambda: triton.find(x, amax.rows, None)), rate(2, lambda: triton.find(x, *by_row))]
    writes = [rate(3, lambda: triton.write(x, E4M3, target_by_row, None))]
    writes += [rate(4, lambda: triton.write(x, E4M3, target_by_row, turned_by_row))]
    lines += [f"find: one {finds[0]}, by row {finds[1]}; write by row: rows {writes[0]}, both {writes[1]}"]
    guess.on(x.device).copy_(torch.stack([amax.rows.view(torch.int32)[0], guess.on(x.device)[1]]))
    bits.copy_(guess.on(x.device)[:1].expand(2))
    repair = _ms(lambda: triton.repair(x, E4M3, target, turned, bits, guessed))
    times = []
    for both in (False, True):
        before = guess.wrong
        times += [_ms(lambda b=both: casts.find_and_cast([x], "tensor", E4M3, 0, both=b))]  # type: ignore[misc]
        times += [_ms(lambda b=both: casts.find_and_cast([x], "tensor", E4M3, 0, both=b, guess=guess))]  # type: ignore[misc]
        assert guess.wrong == before
        lines += [f"{'both casts' if both else 'cast'}: {times[-2]:.3f} ms, with a right guess {times[-1]:.3f} ms"]
    lines += [f"a right guess's repair: {repair:.4f} ms"]
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    if channels > 2048:  # below that the host may take longer than the device
        assert times[1] < times[0] and times[3] < times[2], "a right guess saves a pass"


@SCALINGS
def test_speed_of_the_products(scaling: casts.Scaling, capsys: pytest.CaptureFixture[str]) -> None:
    """Milliseconds per product of 32,768 tokens: bf16, FP8 without casts by both sums; all three with their casts."""
    recipe = Recipe(scaling, E4M3)
    lines = [
        f"{torch.cuda.get_device_name()}, {scaling}; forward + backward in ms, and one product's TFLOP/s",
        f"{'product':<18}{'bf16':>8}{'fp8':>8}{'gain':>7}{'amax':>8}{'cast':>8}{'both':>8}{'bf16 T':>9}{'fp8 T':>8}"
        f"{'fast T':>8}",
    ]
    for name, (inputs, outputs) in PRODUCTS.items():
        x = torch.randn(TOKENS, inputs, device="cuda").bfloat16().requires_grad_()
        weight = (torch.randn(outputs, inputs, device="cuda") * 0.02).bfloat16().requires_grad_()
        grad = torch.randn(TOKENS, outputs, device="cuda").bfloat16()

        def train(compute: Callable[[], Tensor], x: Tensor = x, weight: Tensor = weight, grad: Tensor = grad) -> None:
            torch.autograd.grad(compute(), (x, weight), grad)

        plain = _ms(lambda t=train, x=x, w=weight: t(lambda: x @ w.t()))  # type: ignore[misc]
        its = [Outputs((outputs,))]
        lowered = _ms(lambda t=train, x=x, w=weight, o=its: t(lambda: fp8_linears(x, [w], o, recipe)[0]))  # type: ignore[misc]
        detached, w = x.detach(), weight.detach()
        amax = casts.greatest([detached], scaling, 0)
        spent = [
            _ms(lambda d=detached: casts.greatest([d], scaling, 0)),  # type: ignore[misc]
            _ms(lambda d=detached, a=amax: casts.cast_rows([d], a, E4M3, 0)),  # type: ignore[misc]
            _ms(lambda d=detached, a=amax: casts.cast_both([d], a, E4M3, 0)),  # type: ignore[misc]
        ]
        left = casts.cast_rows([detached], amax, E4M3, 0)
        right = casts.cast_rows([w], casts.greatest([w], scaling, 0), E4M3, 0)
        flops = 2 * TOKENS * inputs * outputs / 1e9
        rates = [flops / _ms(lambda d=detached, w=w: d @ w.t())]  # type: ignore[misc]
        rates += [flops / _ms(lambda a=left, b=right, f=f: casts.product(a, b, fast=f)) for f in (False, True)]  # type: ignore[misc]
        times = "".join(f"{value:>8.3f}" for value in spent)
        lines.append(
            f"{name:<18}{plain:>8.3f}{lowered:>8.3f}{plain / lowered:>6.2f}x{times}{rates[0]:>9.0f}{rates[1]:>8.0f}"
            f"{rates[2]:>8.0f}"
        )
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    assert fp8.FAST.keys() == {"output", "input gradient", "weight gradient"}
