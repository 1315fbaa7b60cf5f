"""Recomputed blocks give the gradients of blocks that keep everything, and forget what they are told to forget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fusiontree.ops.attention.flex import attention_flex
from fusiontree.ops.attention.reference import AttentionInputs, attention_reference
from fusiontree.ops.documents import Documents
from fusiontree.ops.elementwise import compiled
from fusiontree.ops.norm.reference import rms_norm
from fusiontree.ops.ssd.exchange import Exchange
from fusiontree.parallel import activation_checkpointing
from fusiontree.parallel.activation_checkpointing import _keeping, checkpoint_activations
from tests.helpers import tiny_model


def run(mode: str, layers: int | None = None) -> tuple[list[Tensor], int]:
    """Return the gradients, and how many bytes the forward kept for the backward outside recomputed blocks."""
    model = tiny_model(layer_pattern="FMA", window_size=8)
    checkpoint_activations(model, mode, layers)
    ids = torch.arange(64).view(2, 32) % 40
    positions = torch.arange(32).repeat(2, 1)
    positions[0, 11:] -= 11
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, labels_BS=ids, documents=Documents.from_positions(positions)).loss_sum
    loss.backward()
    return [p.grad for p in model.parameters()], sum(kept.values())


@pytest.mark.parametrize("mode", ["selective", "full", "offload"])
@pytest.mark.parametrize("layers", [None, 1])
def test_recomputation_keeps_the_gradients(mode: str, layers: int | None) -> None:
    plain, all_bytes = run("none")
    grads, bytes_kept = run(mode, layers)
    assert bytes_kept < all_bytes
    for mine, theirs in zip(grads, plain, strict=True):
        assert torch.equal(mine, theirs)


def test_a_forward_without_gradients_copies_nothing_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(layer_pattern="FF")
    ids = torch.arange(32).view(2, 16)
    plain = model(ids).logits_BSV.detach()
    checkpoint_activations(model, "offload")
    sent: list[Any] = []
    monkeypatch.setattr(activation_checkpointing._Offloaded, "send", lambda stored: sent.append(stored))
    with torch.no_grad():
        assert torch.equal(model(ids).logits_BSV, plain)
    assert not sent
    model(ids)
    assert len(sent) == 2


def test_fewer_layers_recompute_less() -> None:
    assert run("selective", 1)[1] > run("selective", 2)[1] > run("selective")[1]


def test_the_layers_left_out_of_full_recomputation_are_selective() -> None:
    model = tiny_model(layer_pattern="FFF")
    checkpoint_activations(model, "full", 2)
    assert [block.forward.mode for block in model.layers] == ["full", "full", "selective"]


@pytest.mark.slow
def test_flex_attention_compiles_inside_a_recomputed_block() -> None:
    """As on a GPU, where a fully recomputed block's first forward is what compiles it."""
    q, k, v = (torch.randn(1, 256, 2, 32) for _ in range(3))
    with torch.no_grad():
        keep, _ = _keeping()
        with keep:
            got = attention_flex(AttentionInputs(q, k, v, window=100))
        want = attention_reference(AttentionInputs(q, k, v, window=100))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_formulas_stay_compiled_inside_a_recomputed_block() -> None:
    """torch runs a compiled function step by step where a mode watches; at 128K tokens that cost a tenth of a step."""
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x, weight = torch.randn(4, 16, requires_grad=True), torch.ones(16)
    norm = compiled(rms_norm)
    with Watch():
        got = norm(x, weight, 1e-5)
    assert not seen
    got.sum().backward()
    torch.testing.assert_close(got, rms_norm(x, weight, 1e-5))
    assert x.grad is not None


class _Exchanged(torch.autograd.Function):
    """As a scan by kernels treats a state that comes from outside: its gradient is a backward pass inside another."""

    @staticmethod
    def forward(ctx: Any, reached: Tensor, decay: Tensor) -> Tensor:
        ctx.exchange = Exchange(lambda z, kept: z.exp() * kept[..., None, None], reached, decay)
        return reached + ctx.exchange.initial_BHPN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        dreached, _ = ctx.exchange.backward(grads[0])
        return grads[0] + dreached, torch.zeros(2, 3)


def test_a_block_whose_scan_exchanges_states_is_recomputed_once() -> None:
    runs: list[int] = []

    def block(x: Tensor) -> Tensor:
        runs.append(1)
        return _Exchanged.apply(x.sin(), torch.ones(2, 3)).cos()

    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    (want,) = torch.autograd.grad(block(x).sum(), x)
    runs.clear()
    y = checkpoint(block, x, use_reentrant=False, context_fn=_keeping)
    (got,) = torch.autograd.grad(y.sum(), x)
    assert len(runs) == 2  # the forward and one recomputation
    torch.testing.assert_close(got, want)
