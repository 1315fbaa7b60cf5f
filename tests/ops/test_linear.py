"""Linear maps of one input against the plain ones: outputs and gradients."""

from __future__ import annotations

import pytest
import torch

from fusiontree.ops.linear import add_product, linears, reference

SPLITS = [(3, 2), (4,), (1, 1, 2)]


@pytest.mark.parametrize("used", ["all", "some"])
def test_outputs_and_gradients(used: str) -> None:
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True)  # noqa: E731
    x = rand(2, 5, 6)
    weights = [rand(sum(sizes), 6) for sizes in SPLITS]
    chosen = {"all": range(6), "some": (1, 5)}[used]
    found = []
    for compute in (linears, reference.linears):
        outputs = compute(x, weights, SPLITS)
        loss = sum(((k + 1) * outputs[k].square()).sum() for k in chosen)
        grads = torch.autograd.grad(loss, [x, *weights], allow_unused=True, materialize_grads=True)
        found.append([*outputs, *grads])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("contiguous", [True, False])
def test_passed_input(contiguous: bool) -> None:
    """The products add to the gradient of the input's further use, in the memory of that gradient."""
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True)  # noqa: E731
    x, weights = rand(2, 5, 6), [rand(4, 6), rand(3, 6)]
    grads = [rand(2, 5, 4).detach(), rand(2, 5, 3).detach()]
    further = torch.randn(2, 5, 6, dtype=torch.float64) if contiguous else torch.ones(1, 1, 6).double().expand(2, 5, 6)
    plain = reference.linears(x, weights, [(4,), (3,)])
    expected = torch.autograd.grad((*plain, x * 1), [x, *weights], (*grads, further))
    outputs = linears(x, weights, [(4,), (3,)], passes=True)
    assert torch.equal(outputs[-1], x)
    found = torch.autograd.grad(outputs, [x, *weights], (*grads, further))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert (found[0].data_ptr() == further.data_ptr()) == contiguous


def test_only_the_passed_input_has_a_gradient() -> None:
    x, weight = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    dx, dweight = torch.autograd.grad(
        linears(x, [weight], [(4,)], passes=True)[-1].sum(), [x, weight], allow_unused=True
    )
    assert torch.equal(dx, torch.ones(2, 3)) and dweight is None


@pytest.mark.parametrize("joint", [False, True])
def test_product_added_to_another(joint: bool) -> None:
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g, requires_grad=True)  # noqa: E731
    start, x, module = rand(2, 5, 4), rand(2, 5, 6), torch.nn.Linear(6, 4, bias=False)
    leaves, dout = [start, x, module.weight], torch.randn(2, 5, 4, generator=g)
    expected = start + module(x)
    first = start * 1
    found = add_product(first, x, module, joint=joint)
    assert (found.data_ptr() == first.data_ptr()) == joint
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(*(torch.autograd.grad(out, leaves, dout) for out in (found, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)
