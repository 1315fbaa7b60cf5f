"""Results marked as recomputed are not kept, are computed once for all who need them, and change no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fusiontree.ops.recompute import Recomputed, recomputed


class Formula:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, w: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(x) * w


def chain(x: Tensor, w: Tensor, first: Formula, second: Formula) -> Tensor:
    y = recomputed(first, x, w)
    z = recomputed(second, y, w)  # computed from a result that is itself computed again
    return (y.flatten(0, 1) @ w[:, None]).square().sum() + (z[:, 1:] * z[:, 1:]).sum() + (y @ w).sin().sum()


def test_gradients_and_number_of_calls() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, generator=g, dtype=torch.float64, requires_grad=True)
    w = torch.nn.Parameter(torch.randn(4, generator=g, dtype=torch.float64))
    want = torch.autograd.grad(chain(x, w, Formula(), Formula()), (x, w))
    first, second = Formula(), Formula()
    with Recomputed():
        out = chain(x, w, first, second)
    got = torch.autograd.grad(out, (x, w))
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)
    assert (first.calls, second.calls) == (2, 2)


def test_a_marked_result_is_not_kept() -> None:
    x, w = torch.randn(8, 64), torch.nn.Parameter(torch.randn(64))
    with Recomputed():
        y = recomputed(lambda x, w: x * w, x, w)
        out = y @ w
    place = y.untyped_storage().data_ptr()
    saved = out.grad_fn._saved_self  # unpacked: computed again, into memory of its own
    assert torch.equal(saved, y)
    assert saved.untyped_storage().data_ptr() != place


def test_memory_that_was_given_to_another_tensor_is_not_mistaken() -> None:
    w = torch.nn.Parameter(torch.ones(64))
    with Recomputed():
        for k in range(50):  # results die at once; the allocator hands their memory out again
            recomputed(lambda x, w: x * w, torch.full((64,), float(k)), w)
        fresh = torch.arange(64.0)
        out = (fresh * w).sum()
    assert torch.equal(torch.autograd.grad(out, w)[0], fresh)


def test_views_of_inputs_are_left_alone() -> None:
    x = torch.randn(4, 4, requires_grad=True)
    with Recomputed():
        y = recomputed(lambda x: x.t(), x)
        out = (y * y).sum()
    assert torch.equal(torch.autograd.grad(out, x)[0], 2 * x)
