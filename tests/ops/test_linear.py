"""Linear maps of one input against the plain ones: outputs and gradients."""

from __future__ import annotations

import pytest
import torch

from fusiontree.ops.linear import linears, reference

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
