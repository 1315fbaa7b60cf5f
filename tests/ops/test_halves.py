"""Halves of channels: values, gradients, and when the gradients are copied."""

from __future__ import annotations

import pytest
import torch

from fusiontree.ops.halves import halves


@pytest.mark.parametrize(
    ("grads", "copied"),
    [
        pytest.param(torch.randn(2, 3, 2, 4).unbind(2), False, id="side by side"),
        pytest.param(torch.randn(2, 3, 2, 4).unbind(2)[::-1], True, id="in reverse order"),
        pytest.param(torch.randn(2, 2, 3, 4).unbind(1), True, id="one after the other"),
        pytest.param((torch.randn(2, 3, 4), torch.randn(2, 3, 4)), True, id="apart"),
    ],
)
def test_gradients(grads: tuple[torch.Tensor, torch.Tensor], copied: bool) -> None:
    x_BSC = torch.randn(2, 3, 8, requires_grad=True)
    parts = halves(x_BSC)
    assert torch.equal(torch.cat(parts, dim=-1), x_BSC)
    (found,) = torch.autograd.grad(parts, x_BSC, grads)
    assert torch.equal(found, torch.cat(grads, dim=-1))
    assert (found.untyped_storage().data_ptr() != grads[0].untyped_storage().data_ptr()) == copied


def test_one_half_without_a_gradient() -> None:
    x_BSC = torch.randn(2, 3, 8, requires_grad=True)
    (found,) = torch.autograd.grad(halves(x_BSC)[1].sum(), x_BSC)
    assert torch.equal(found, torch.cat([torch.zeros(2, 3, 4), torch.ones(2, 3, 4)], dim=-1))
