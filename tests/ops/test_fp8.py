"""FP8 products against the recipe written out: scales, casts, outputs, gradients; outliers, zeros, NaN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusiontree.ops.fp8 import Guesses, KeptCasts, Outputs, Recipe, casts, fp8_linears, reference
from fusiontree.ops.fp8.casts import E4M3, E5M2
from fusiontree.ops.fp8.linear import Fp8Linear, Fp8Product
from fusiontree.ops.linear import project

RECIPES = pytest.mark.parametrize("recipe", [Recipe("tensor", E4M3), Recipe("row", E4M3), Recipe("tensor", E5M2)])
N, C = 48, 32
OUTPUTS = [Outputs((32, 16, 5), bf16=1), Outputs((16,)), Outputs((4, 4), bf16=2)]
"""Parts of a first weight in both precisions, a weight in FP8 alone and one in bf16 alone."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Values with outlier channels."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    values[..., ::7] *= 30.0
    return values.bfloat16()


def rounded(matrix: Tensor, dtype: torch.dtype, scaling: str) -> Tensor:
    """The values that a matrix has in FP8, in fp64: each row, or all, scaled by the greatest power of two that fits."""
    wide = matrix.double()
    amax = wide.abs().amax(1, keepdim=True) if scaling == "row" else wide.abs().amax()
    scale = torch.exp2(torch.floor(torch.log2(torch.finfo(dtype).max / amax)))
    return (wide * scale).float().to(dtype).double() / scale


def expected(x: Tensor, weights: Sequence[Tensor], grads: Sequence[Tensor], recipe: Recipe) -> list[Tensor]:
    """Outputs, gradient of the input, gradients of the weights; each FP8 product of two rounded factors."""
    scaling, dtype = recipe.scaling, recipe.gradient
    fp8 = torch.cat([weight[: its.fp8_rows] for weight, its in zip(weights, OUTPUTS, strict=True)])
    rounded_w, x_rounded = rounded(fp8, E4M3, scaling), rounded(x, E4M3, scaling)
    pending, parts, outputs, at = list(grads), [], [], 0
    plain: list[tuple[Tensor, Tensor]] = []
    for weight, its in zip(weights, OUTPUTS, strict=True):
        rows = 0
        for index, size in enumerate(its.sizes):
            in_fp8 = index < len(its.sizes) - its.bf16
            its_rows = weight[rows : rows + size].double()
            outputs.append(x_rounded @ rounded_w[at : at + size].t() if in_fp8 else x.double() @ its_rows.t())
            grad = pending.pop(0)
            if in_fp8:
                parts.append(grad)
                at += size
            else:
                plain.append((grad.double(), its_rows))
            rows += size
    g = torch.cat(parts, 1)
    dx = rounded(g, dtype, scaling) @ rounded(fp8.t(), E4M3, scaling).t()
    dx += sum(grad @ weight for grad, weight in plain)
    dw = rounded(g.t(), dtype, scaling) @ rounded(x.t(), E4M3, scaling).t()
    dweights, at = [], 0
    plain_grads = [grad.t() @ x.double() for grad, _ in plain]
    for its in OUTPUTS:
        here = [dw[at : at + its.fp8_rows], *(plain_grads.pop(0) for _ in range(its.bf16))]
        dweights.append(torch.cat(here))
        at += its.fp8_rows
    return [*outputs, dx, *dweights]


def computed(
    x: Tensor,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    recipe: Recipe,
    kept: KeptCasts | None = None,
    guesses: Guesses | None = None,
) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, *weights)]
    outputs = fp8_linears(leaves[0], leaves[1:], OUTPUTS, recipe, kept, guesses)
    used = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
    torch.autograd.backward(*zip(*used, strict=True))
    return [*outputs, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def case() -> tuple[Tensor, list[Tensor], list[Tensor]]:
    weights = [draw(sum(its.sizes), C, seed=index) for index, its in enumerate(OUTPUTS)]
    sizes = [size for its in OUTPUTS for size in its.sizes]
    grads = [draw(3, N // 3, size, seed=10 + index) * 1e-4 for index, size in enumerate(sizes)]
    return draw(3, N // 3, C, seed=5), weights, grads


def flat(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.flatten(0, -2) for tensor in tensors]


@RECIPES
def test_outputs_and_gradients_are_those_of_the_recipe(recipe: Recipe) -> None:
    x, weights, grads = case()
    got = [tensor.detach() for tensor in computed(x, weights, grads, recipe)]
    want = expected(x.flatten(0, -2), weights, flat(grads), recipe)
    assert len(got) == len(want)
    for mine, theirs in zip(flat(got), want, strict=True):
        # bf16 rounds twice where the bf16 part of the input's gradient is added.
        torch.testing.assert_close(mine.double(), theirs, rtol=2**-7, atol=2**-7 * float(theirs.abs().max()))
        assert float((mine.double() - theirs).norm() / theirs.norm()) < 4e-3


def test_a_missing_gradient_counts_as_zeros() -> None:
    x, weights, grads = case()
    for missing in (1, 2, 3, 5):
        zeros = [torch.zeros_like(grad) if index == missing else grad for index, grad in enumerate(grads)]
        some = [None if index == missing else grad for index, grad in enumerate(grads)]
        for mine, theirs in zip(
            computed(x, weights, some, Recipe()), computed(x, weights, zeros, Recipe()), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_gradients_of_bf16_parts_alone() -> None:
    x, weights, grads = case()
    some = [grad if index in (2, 5) else None for index, grad in enumerate(grads)]
    leaves = [tensor.clone().requires_grad_() for tensor in (x, *weights)]
    outputs = fp8_linears(leaves[0], leaves[1:], OUTPUTS, Recipe())
    torch.autograd.backward([outputs[2], outputs[5]], [some[2], some[5]])
    assert leaves[2].grad is None, "no part of this weight has a gradient"
    want = grads[2].flatten(0, -2).t() @ x.flatten(0, -2)
    assert leaves[1].grad is not None and torch.equal(leaves[1].grad[48:], want)
    assert not leaves[1].grad[:48].any()


def test_scales_are_the_greatest_powers_of_two_that_fit() -> None:
    amax = torch.tensor([448.0, 449.0, 1.75, 1.7500001, 1.0, 3e-5, 0.0, torch.inf, torch.nan, 1e-45, 3e38])
    scales = reference.scales_of(amax, E4M3)
    assert scales[:5].tolist() == [1.0, 0.5, 256.0, 128.0, 256.0]
    finite = amax.isfinite() & (amax > 1e-20)
    assert ((amax * scales)[finite] <= 448).all() and ((amax * scales * 2)[finite] > 448).all()
    assert scales[6:7].isfinite().all() and scales[7:9].isnan().all() and scales[9:].isfinite().all()
    assert scales[scales.isfinite()].reciprocal().min().square() > 0, "a product of two inverse scales is not zero"
    assert reference.scales_of(torch.tensor([57344.0, 57345.0]), E5M2).tolist() == [1.0, 0.5]


def test_values_are_cast_alike_under_every_scale_unless_they_become_subnormal() -> None:
    """Ranks with shards of one matrix need not agree on its greatest value."""
    x = torch.linspace(0.5, 4.0, 64)[:, None].bfloat16()
    alone = reference.cast(x, reference.greatest(x), E4M3)
    with_outlier = reference.cast(x, torch.tensor([300.0]), E4M3)
    assert torch.equal(alone.values_RK.float() * alone.inverse, with_outlier.values_RK.float() * with_outlier.inverse)


@pytest.mark.parametrize("scaling", ["tensor", "row"])
def test_zeros_and_values_that_are_not_finite(scaling: casts.Scaling) -> None:
    x, weights, grads = case()
    recipe = Recipe(scaling)
    zero = computed(torch.zeros_like(x), weights, [torch.zeros_like(grad) for grad in grads], recipe)
    assert not any(tensor.any() for tensor in zero)
    for bad in (torch.nan, torch.inf):
        spoiled = x.clone()
        spoiled[1, 2, 3] = bad
        outputs = computed(spoiled, weights, grads, recipe)
        assert outputs[0][1, 2].isnan().all(), "the token's outputs"
        for gradient in outputs[len(grads) + 1 : len(grads) + 3]:  # of the weights with FP8 parts
            assert gradient[:16, 3].isnan().all(), "the channel's gradients"
        spoiled_grads = [grads[0].clone(), *grads[1:]]
        spoiled_grads[0][1, 2, 3] = bad
        assert computed(x, weights, spoiled_grads, recipe)[len(grads)][1, 2].isnan().all(), "the input's gradient"


@RECIPES
def test_kept_casts_are_those_of_the_weights_until_they_are_marked(recipe: Recipe) -> None:
    x, weights, grads = case()
    kept = KeptCasts()
    first = computed(x, weights, grads, recipe, kept)
    for mine, theirs in zip(first, computed(x, weights, grads, recipe), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    places = [cast.values_RK.data_ptr() for cast in kept._both or ()]
    changed = [2.5 * weight for weight in weights]
    torch.testing.assert_close(computed(x, changed, grads, recipe, kept)[0], first[0], rtol=0, atol=0)
    kept.valid = False
    for mine, theirs in zip(
        computed(x, changed, grads, recipe, kept), computed(x, changed, grads, recipe), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert places == [cast.values_RK.data_ptr() for cast in kept._both or ()], "a recorded step reads this memory"


def test_projections_of_one_input_are_equal_joint_and_one_by_one() -> None:
    """Up to subnormals of the joint casts, and the sum of three rounded gradients of the input."""
    x = draw(2, 24, C)
    recipe = Recipe("tensor", E4M3)
    plain = nn.Linear(C, 8, bias=False)
    maps = [
        Fp8Linear(nn.Linear(C, 33, bias=False), Fp8Product(recipe, lambda rows: 1)),
        Fp8Linear(nn.Linear(C, 16, bias=False), Fp8Product(recipe)),
        plain,
    ]
    for index, module in enumerate(maps):
        module.weight = nn.Parameter(draw(module.weight.shape[0], C, seed=index))
    cuts = (lambda rows: [16, 16, 1], None, None)
    found = []
    for joint in (True, False):
        leaf = x.clone().requires_grad_()
        outputs = project(leaf, maps, joint=joint, cuts=cuts)
        assert len(outputs) == (5 if joint else 3)
        together = torch.cat(outputs, dim=-1)
        together.backward(draw(2, 24, together.shape[-1], seed=9))
        found.append([together.detach(), leaf.grad, *(module.weight.grad for module in maps)])
        for module in maps:
            module.weight.grad = None
    for mine, theirs in zip(*found, strict=True):
        assert mine is not None and theirs is not None
        assert float((mine - theirs).float().norm() / theirs.float().norm()) < 5e-3


def _guess(part: Tensor, dtype: torch.dtype, rows: Any, columns: Any, found: Tensor, guessed: Tensor) -> None:
    """What the kernel does: casts with the scale of the guess."""
    found[1] = guessed[0]
    casts._find(part, found[:1].view(torch.float32), None)
    for window in (rows, columns):
        if window is not None:
            scaled = window._replace(amax=guessed[:1].view(torch.float32))
            casts._write(part, dtype, *((scaled, None) if window is rows else (None, scaled)))


def _repair(part: Tensor, dtype: torch.dtype, rows: Any, columns: Any, found: Tensor, guessed: Tensor) -> None:
    greatest, guess = found.view(torch.float32).split(1)
    if not torch.equal(reference.scales_of(greatest, dtype), reference.scales_of(guess, dtype)):
        casts._write(part, dtype, rows, columns)
        guessed[1] += 1
    guessed[0] = found[0]


def test_guesses_change_no_result_and_are_mostly_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, backward, and the same again with other values: only a scale that changes is repaired."""
    kernels = (casts._find, casts._write, (_guess, _repair))
    x, weights, grads = case()
    guesses = Guesses()
    three = (guesses.input, guesses.weight, guesses.gradient)
    for factor, wrong in ((1.0, 1), (1.0, 0), (1.0001, 0), (16.0, 1)):
        others = [factor * weight for weight in weights]
        its_grads = [factor * grad for grad in grads]
        want = computed(factor * x, others, its_grads, Recipe())
        before = [guess.wrong for guess in three]
        with monkeypatch.context() as patch:
            patch.setattr(casts._KERNELS, "choose", lambda wanted, device: kernels)
            got = computed(factor * x, others, its_grads, Recipe(), guesses=guesses)
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
        assert [guess.wrong > count for guess, count in zip(three, before, strict=True)] == [bool(wrong)] * 3


def test_modules_keep_their_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(casts._KERNELS, "choose", lambda wanted, device: (casts._find, casts._write, (_guess, _repair)))
    maps = [Fp8Linear(nn.Linear(C, 16, bias=False), Fp8Product(Recipe())) for _ in range(2)]
    for index, module in enumerate(maps):
        module.weight = nn.Parameter(draw(16, C, seed=index))
    x = draw(2, 24, C)
    for joint in (True, False):
        for _ in range(2):
            project(x, maps, joint=joint)
    assert maps[0].product.guesses.input.wrong == 1, "the first alone"
    assert maps[0].product.guesses.input._bits is not None and maps[1].product.guesses.input.wrong == 1
