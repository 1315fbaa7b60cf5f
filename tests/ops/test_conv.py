"""The convolution against torch's, documents alone, and pieces with a halo."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from fusiontree.ops.conv import causal_conv1d
from fusiontree.ops.documents import Documents
from tests.ops.test_ssd import positions


def inputs(length: int = 23) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(2, length, 6), (6, 4), (6,)]
    return [torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]


def test_equals_conv1d_with_gradients() -> None:
    x, weight, bias = inputs()
    want = F.silu(F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), bias, padding=3, groups=6)[..., :23]).transpose(1, 2)
    got = causal_conv1d(x, weight, bias)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(out.square().sum(), (x, weight, bias)) for out in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_packed_documents_equal_each_alone() -> None:
    x, weight, bias = inputs()
    documents = Documents.from_positions(positions(2, 23, [[0, 2, 3, 10]]))
    packed = causal_conv1d(x, weight, bias, documents=documents)
    bounds = [0, 2, 3, 10, 23]
    alone = [causal_conv1d(x[:, a:b], weight, bias) for a, b in itertools.pairwise(bounds)]
    torch.testing.assert_close(packed, torch.cat(alone, 1))


@pytest.mark.parametrize("starts", [[[0]], [[0, 9, 10], [0, 8]], [[0, 12], [0, 11]]])
def test_pieces_with_a_halo_equal_the_row(starts: list[list[int]]) -> None:
    x, weight, bias = inputs(24)
    p = positions(2, 24, starts)
    want = causal_conv1d(x, weight, bias, documents=Documents.from_positions(p))
    left = causal_conv1d(x[:, :10], weight, bias, documents=Documents.from_positions(p[:, :10]))
    documents = Documents.from_positions(p[:, 10:])
    right = causal_conv1d(x[:, 10:], weight, bias, documents=documents, initial_BKC=x[:, 7:10])
    torch.testing.assert_close(torch.cat([left, right], 1), want)


def test_no_bias_no_activation_and_unknown_activation() -> None:
    x, weight, _ = inputs()
    want = F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), padding=3, groups=6)[..., :23].transpose(1, 2)
    torch.testing.assert_close(causal_conv1d(x, weight, None, activation=None), want)
    with pytest.raises(ValueError, match="relu"):
        causal_conv1d(x, weight, None, activation="relu")


def test_low_precision_keeps_its_type() -> None:
    x, weight, bias = (t.detach().bfloat16() for t in inputs())
    assert causal_conv1d(x, weight, bias).dtype == torch.bfloat16


@pytest.mark.parametrize("activation", ["silu", None])
def test_tokens_one_by_one_equal_the_row(activation: str | None) -> None:
    x, weight, bias = inputs(9)
    want = causal_conv1d(x, weight, bias, activation=activation)
    padded = F.pad(x, (0, 0, 3, 0))
    tokens = [
        causal_conv1d(x[:, t : t + 1], weight, bias, initial_BKC=padded[:, t : t + 3], activation=activation)
        for t in range(9)
    ]
    got = torch.cat(tokens, 1)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(out.square().sum(), (x, weight, bias)) for out in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
