"""Rotary encoding: relative, norm-preserving, exact far out."""

from __future__ import annotations

import math

import pytest
import torch

from fusiontree.ops.rotary import apply_rotary, rotary_tables, rotate_and_cut


def rotated(x: torch.Tensor, position: int) -> torch.Tensor:
    return apply_rotary(x, *(t.double() for t in rotary_tables(torch.tensor([[position]]), x.shape[-1], 10000.0)))


def test_scores_depend_on_the_distance_alone() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 16, generator=g, dtype=torch.float64) for _ in range(2))
    scores = [(rotated(q, p + 7) * rotated(k, p)).sum() for p in (0, 5, 1000)]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores[0], scores[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotated(q, 3).norm(), q.norm(), rtol=1e-6, atol=1e-6)


def test_angles_are_exact_at_long_positions() -> None:
    cos, sin = rotary_tables(torch.tensor([[131071]]), 8, 10000.0)
    angle = 131071 * 10000.0 ** (-2 / 8)
    assert math.isclose(float(cos[0, 0, 1]), math.cos(angle), abs_tol=1e-6)
    assert math.isclose(float(sin[0, 0, 1]), math.sin(angle), abs_tol=1e-6)


def test_gradient_is_the_inverse_rotation() -> None:
    x = torch.randn(1, 4, 2, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = rotary_tables(torch.arange(4).unsqueeze(0), 8, 10000.0)
    weight = torch.randn_like(x)
    (grad,) = torch.autograd.grad((apply_rotary(x, cos, sin) * weight).sum(), x)
    torch.testing.assert_close(grad, apply_rotary(weight, cos, -sin))


@pytest.mark.parametrize("first", [(3, 1), (4, 2), (0, 0)])
def test_cut_heads_are_rotated_and_so_are_their_gradients(first: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, h, 4, generator=g, dtype=torch.float64, requires_grad=True) for h in (4, 2))
    cos, sin = (t.double() for t in rotary_tables(torch.arange(3).unsqueeze(0), 4, 10000.0))

    def parts(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        queries, keys = rotate_and_cut(q, k, cos, sin, first)
        return *queries, *keys

    cut = [*apply_rotary(q, cos, sin).split([first[0], 4 - first[0]], 2)]
    cut += apply_rotary(k, cos, sin).split([first[1], 2 - first[1]], 2)
    for value, expected in zip(parts(q, k), cut, strict=True):
        torch.testing.assert_close(value, expected)
    assert torch.autograd.gradcheck(lambda q, k: tuple(x for x in parts(q, k) if x.numel()), (q, k))
