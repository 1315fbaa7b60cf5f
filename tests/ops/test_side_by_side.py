"""Products side by side in one memory: equal to a concatenation, and without one where possible."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusiontree.ops.linear.side_by_side import joined, product_in


class Sharded(nn.Parameter):
    """Stands for a weight of another type than nn.Parameter, as a sharded one has."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["in place", "in reverse order", "one elsewhere", "no memory", "a sharded weight"])
def test_values_and_gradients(case: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(2, 5, size, generator=g).to(dtype).requires_grad_() for size in (6, 7)]
    modules = [nn.Linear(size, 4, bias=False, dtype=dtype) for size in (6, 7)]
    grad = torch.randn(2, 5, 8, generator=g).to(dtype)
    memory = None if case == "no memory" else torch.full((2, 5, 8), torch.nan, dtype=dtype)
    places = [None, None] if memory is None else list(memory.chunk(2, dim=-1))
    if case == "in reverse order":
        places.reverse()
    if case == "one elsewhere":
        places[1] = None
    if case == "a sharded weight":
        modules[0].weight = Sharded(modules[0].weight)
    parts = [product_in(x, module, place) for x, module, place in zip(xs, modules, places, strict=True)]
    found = joined(parts, memory)
    assert (memory is not None and found.data_ptr() == memory.data_ptr()) == (case == "in place")
    expected = torch.cat([module(x) for x, module in zip(xs, modules, strict=True)], dim=-1)
    leaves = [*xs, *(module.weight for module in modules)]
    results = [(out, *torch.autograd.grad(out, leaves, grad)) for out in (found, expected)]
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)
