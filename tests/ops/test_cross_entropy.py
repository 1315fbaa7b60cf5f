"""Chunked against whole logits: values and gradients of both sums."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fusiontree.ops.cross_entropy import linear_cross_entropy


def inputs(tokens: int = 37) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 8, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 8, generator=g, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 50, (tokens,), generator=g)
    labels[::5] = -100
    return hidden, weight, labels


def test_the_definition_is_torchs() -> None:
    hidden, weight, labels = inputs()
    loss, z = linear_cross_entropy(hidden, weight, labels, backend="reference")
    logits = hidden @ weight.t()
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
    torch.testing.assert_close(z, logits.logsumexp(-1)[labels >= 0].square().sum())


@pytest.mark.parametrize("chunk", [1, 8, 37, 100])
@pytest.mark.parametrize("z_weight", [0.0, 0.3])
def test_chunked_equals_the_definition(chunk: int, z_weight: float) -> None:
    hidden, weight, labels = inputs()
    results = []
    for backend in ("chunked", "reference"):
        loss, z = linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk, backend=backend)
        grads = torch.autograd.grad(0.7 * loss + z_weight * z, (hidden, weight))
        results.append((loss, z, *grads))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_no_label_at_all_is_zero_not_nan() -> None:
    hidden, weight, labels = inputs()
    loss, z = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    (loss + z).backward()
    assert loss.item() == z.item() == 0.0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_sums_are_fp32_for_bf16_inputs() -> None:
    hidden, weight, labels = (t.detach() for t in inputs())
    loss, z = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels)
    assert loss.dtype == z.dtype == torch.float32
