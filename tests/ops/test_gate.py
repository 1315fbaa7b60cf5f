"""The gate mix and its sums against their definition. Shape legend: B rows, S tokens, C channels."""

from __future__ import annotations

import pytest
import torch

from fusiontree.ops.gate import gate_mix


def definition(logits, branches, counted, kind):
    gate = torch.sigmoid(logits)
    entropy = -(gate * gate.log() + (1 - gate) * (1 - gate).log())
    weight = counted[..., None].to(gate.dtype)
    sums = [(value * weight).sum((1, 2)) for value in (gate, entropy, gate.square())]
    m, a = branches.chunk(2, dim=-1) if kind == "both" else (branches, branches)
    mixed = {"both": gate * m + (1 - gate) * a, "first": gate * m, "second": (1 - gate) * a}[kind]
    return [mixed, *sums]


@pytest.mark.parametrize("kind", ["both", "first", "second"])
@pytest.mark.parametrize("masked", [False, True])
def test_mix_sums_and_gradients_follow_the_definition(kind, masked):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    width = 6 if kind == "both" else 3
    branches = torch.randn(2, 5, width, dtype=torch.float64, generator=generator, requires_grad=True)
    counted = torch.rand(2, 5, generator=generator) > 0.4 if masked else torch.ones(2, 5, dtype=torch.bool)

    def flat(logits, branches):
        mixed, sums = gate_mix(logits, branches, counted if masked else None, given=kind)
        return [mixed, *sums]

    for value, expected in zip(flat(logits, branches), definition(logits, branches, counted, kind), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-12, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda *inputs: tuple(flat(*inputs)), (logits, branches))


def test_sums_are_fp32_and_finite_for_decided_gates_in_half_precision():
    logits = torch.tensor([[[80.0, -80.0, 0.0]]], dtype=torch.bfloat16, requires_grad=True)
    branches = torch.ones(1, 1, 6, dtype=torch.bfloat16)
    mixed, sums = gate_mix(logits, branches)
    assert mixed.dtype == torch.bfloat16
    assert {value.dtype for value in sums} == {torch.float32}
    torch.testing.assert_close(torch.stack(list(sums))[:, 0], torch.tensor([1.5, 0.693147, 1.25]), atol=1e-5, rtol=0)
    sums[1].sum().backward()
    assert torch.isfinite(logits.grad).all()
