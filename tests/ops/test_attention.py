"""Blockwise and whole SDPA against the masked definition, and cached attention against a full pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusiontree.ops.attention import attention, cached_attention, decode_attention, key_bias, roomy
from fusiontree.ops.attention.reference import AttentionInputs, attention_reference
from fusiontree.ops.attention.sdpa import attention_sdpa
from fusiontree.ops.attention.split_causal import causal_suffix_attention
from fusiontree.ops.documents import Documents
from tests.ops.test_ssd import positions

Attend = Callable[[AttentionInputs], torch.Tensor]


def inputs(queries: int, keys: int, heads: int = 4, kv_heads: int = 2) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(2, queries, heads, 8), (2, keys, kv_heads, 8), (2, keys, kv_heads, 8)]
    return [torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]


def compare(tensors: list[torch.Tensor], attend: Attend = attention_sdpa, **kind: Any) -> None:
    """Compare outputs and gradients of ``attend`` with the definition."""
    given = AttentionInputs(*tensors, **kind)
    got, want = attend(given), attention_reference(given)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad(out.square().sum(), tensors) for out in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("starts", [None, [[0, 3, 16, 17, 40], [0]]])
@pytest.mark.parametrize("window", [None, 1, 4, 7, 16, 50, 64])
def test_sdpa_equals_the_definition(window: int | None, starts: list[list[int]] | None) -> None:
    documents = None if starts is None else Documents.from_positions(positions(2, 50, starts))
    compare(inputs(50, 50), window=window, documents=documents)


@pytest.mark.parametrize("window", [None, 3, 5, 8])
@pytest.mark.parametrize("halo", [1, 4, 7, 30])
def test_queries_are_the_last_of_the_keys(window: int | None, halo: int) -> None:
    p = positions(2, 20, [[0, 6], [0]])
    p[0, :6] += 3  # continues a document that began three tokens to the left
    p[1] += 100
    compare(inputs(20, 20 + halo), window=window, documents=Documents.from_positions(p))
    compare(inputs(20, 20 + halo), window=window, documents=None)


def test_packed_documents_equal_each_alone() -> None:
    q, k, v = (t.detach() for t in inputs(30, 30))
    documents = Documents.from_positions(positions(2, 30, [[0, 11], [0, 11]]))
    packed = attention(q, k, v, window=6, documents=documents)
    alone = [attention(q[:, p], k[:, p], v[:, p], window=6) for p in (slice(0, 11), slice(11, 30))]
    torch.testing.assert_close(packed, torch.cat(alone, 1))


@pytest.mark.parametrize("window", [None, 5])
def test_cached_keys_may_lie_in_any_order(window: int | None) -> None:
    q, k, v = (t.detach() for t in inputs(12, 12))
    want = attention_reference(AttentionInputs(q, k, v, window=window))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    slots = torch.cat([order, torch.tensor([-1, -1])]).expand(2, -1)
    pad = torch.full((2, 2, 2, 8), 1e3, dtype=torch.float64)
    got = cached_attention(
        q[:, 9:],
        torch.cat([k[:, order], pad], 1),
        torch.cat([v[:, order], pad], 1),
        key_positions_BT=slots,
        query_positions_BS=torch.arange(9, 12).expand(2, -1),
        window=window,
    )
    torch.testing.assert_close(got, want[:, 9:])


def test_a_padding_query_gets_zeros_not_nan() -> None:
    q, k, v = (t.detach() for t in inputs(1, 3))
    empty = torch.full((2, 3), -1)
    out = cached_attention(q, k, v, key_positions_BT=empty, query_positions_BS=torch.tensor([[-1], [4]]))
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("slots", [90, 2048, 2100, 2304])  # the second and the last are cut into parts
def test_single_queries_equal_the_definition(slots: int, kv_heads: int, window: int | None, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 1, 4, 8, generator=g, dtype=torch.float64)
    k, v = (torch.randn(2, kv_heads, slots, 8, generator=g, dtype=torch.float64).transpose(1, 2) for _ in range(2))
    q, k, v = (2 * q).to(dtype), k.to(dtype), v.to(dtype)
    filled = torch.stack([torch.randperm(slots, generator=g) for _ in range(2)])
    filled[filled >= slots - 20] = -1  # empty slots
    queries = torch.tensor([[slots - 21], [slots // 2]])
    want = cached_attention(q, k, v, key_positions_BT=filled, query_positions_BS=queries, window=window)
    for keys, values in ((k, v), (k.contiguous(), v.contiguous())):
        got = decode_attention(q, keys, values, key_bias(filled, queries, window))
        assert got.dtype == dtype
        tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_large_caches_have_room_that_can_be_cut() -> None:
    assert [roomy(n) for n in (0, 1, 2047, 2048, 2049, 32_768)] == [0, 1, 2047, 2048, 2304, 32_768]


def test_fewer_keys_than_queries_is_an_error() -> None:
    q, k, v = inputs(5, 4)
    with pytest.raises(ValueError, match="4 keys are fewer than 5 queries"):
        attention(q, k, v)


@pytest.mark.parametrize(("queries", "keys"), [(8, 24), (16, 17), (1, 30)])
def test_last_tokens_in_two_parts_agree_with_the_definition(queries: int, keys: int) -> None:
    q, k, v = (torch.randn(2, n, 3, 16, requires_grad=True) for n in (queries, keys, keys))
    want = attention_reference(AttentionInputs(q, k, v, scale=0.3))
    got = causal_suffix_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.3).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(want)
    wanted = torch.autograd.grad(want, (q, k, v), upstream)
    for mine, other in zip(torch.autograd.grad(got, (q, k, v), upstream), wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_documents_tell_how_much_lies_before_an_unbroken_piece() -> None:
    def before(*rows: list[int]) -> int | None:
        return Documents.from_positions(torch.tensor(rows)).tokens_before

    assert before([0, 1, 2], [0, 1, 2]) == 0
    assert before([5, 6, 7], [5, 6, 7]) == 5
    assert before([5, 6, 7], [4, 5, 6]) is None
    assert before([5, 6, 0], [5, 6, 7]) is None
    assert before([0, 0, 1]) is None
