"""Norms against their formulas, in groups and in low precision."""

from __future__ import annotations

import torch

from fusiontree.ops.norm import gated_rms_norm, rms_norm


def test_rms_norm_is_its_formula_with_gradients() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, generator=g, dtype=torch.float64, requires_grad=True)
    want = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    got = rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(out.square().sum(), (x, weight)) for out in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_groups_are_normalised_apart() -> None:
    g = torch.Generator().manual_seed(0)
    y, z = (torch.randn(2, 5, 12, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(12, generator=g, dtype=torch.float64)
    got = gated_rms_norm(y, z, weight, groups=3, eps=1e-5)
    gated = y * z * torch.sigmoid(z)
    parts = [rms_norm(part, torch.ones(4, dtype=torch.float64), 1e-5) for part in gated.split(4, dim=-1)]
    want = torch.cat(parts, -1) * weight
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), (y, z)), torch.autograd.grad(want.square().sum(), (y, z)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_low_precision_keeps_its_type() -> None:
    x = torch.randn(2, 3, 8).bfloat16()
    assert rms_norm(x, torch.ones(8), 1e-5).dtype == torch.bfloat16
    assert gated_rms_norm(x, x, torch.ones(8), groups=2, eps=1e-5).dtype == torch.bfloat16
