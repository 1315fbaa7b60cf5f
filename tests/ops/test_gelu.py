"""GELU and a linear map, recomputed or not, against the plain formula; what is kept for the backward pass."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusiontree.ops.gelu import gelu_product
from fusiontree.ops.recompute import Recomputed, kept_tensors


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("joint", [False, True])
def test_values_gradients_and_memory(joint: bool, recompute: bool, adds: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x, start = (torch.randn(2, 5, size, generator=g, requires_grad=True) for size in (6, 4))
    module, dout = nn.Linear(6, 4, bias=False), torch.randn(2, 5, 4, generator=g)
    kept: list[int] = []

    def watch(tensor: Tensor, saved: Any) -> Any:
        kept.extend(value.data_ptr() for value in kept_tensors(saved))
        return saved

    leaves = [x, module.weight, *([start] if adds else [])]
    expected = module(F.gelu(x)) + (start if adds else 0)
    with Recomputed(watch) if recompute else nullcontext():
        found = gelu_product(x, module, start * 1 if adds else None, joint=joint)
    assert not recompute or set(kept) <= {x.data_ptr(), module.weight.data_ptr()}
    results = [(out, *torch.autograd.grad(out, leaves, dout)) for out in (found, expected)]
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)
