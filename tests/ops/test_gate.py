from __future__ import annotations

import torch

from fusiontree.ops.gate import gate_mix


def test_mix_and_gradients() -> None:
    g, m, a = (torch.rand(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    got, want = gate_mix(g, m, a), g * m + (1 - g) * a
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(out.square().sum(), (g, m, a)) for out in (got, want)]
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)
