"""Calls of the flash-attn packages compute attention as defined: windows, documents, keys before the queries."""

from __future__ import annotations

import logging
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusiontree.ops import attention as rooms
from fusiontree.ops.attention import ATTENTION, attention
from fusiontree.ops.attention.flash import PACKAGES, load
from fusiontree.ops.attention.reference import AttentionInputs
from fusiontree.ops.config import KernelsConfig
from fusiontree.ops.documents import Documents
from fusiontree.parallel.activation_checkpointing import _keeping, checkpoint_activations
from fusiontree.utils.errors import UserError
from tests.helpers import tiny_model
from tests.ops.flash_packages import Flash4, install, varlen_attn
from tests.ops.test_attention import compare, inputs
from tests.ops.test_ssd import positions


@pytest.fixture(params=PACKAGES)
def attend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "flash4":
        Flash4(monkeypatch)
    else:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    return load(request.param)


@pytest.mark.parametrize("padded", [0, 6, 9])
@pytest.mark.parametrize("starts", [None, [[0], [0]], [[0, 3, 16, 17, 40], [0]]])
@pytest.mark.parametrize("window", [None, 1, 7, 16, 49, 50, 64])
def test_windows_and_documents(attend: Any, window: int | None, starts: list[list[int]] | None, padded: int) -> None:
    documents = None if starts is None else Documents.from_positions(positions(2, 50, starts))
    documents = documents.padded(padded) if documents is not None and padded else documents
    compare(inputs(50, 50), attend, window=window, documents=documents)
    compare(inputs(50, 50, 6, 3), attend, window=window, documents=documents, scale=0.3)


@pytest.mark.parametrize("window", [None, 1, 5, 8])
@pytest.mark.parametrize("halo", [1, 4, 7, 30])
def test_keys_before_the_queries(attend: Any, window: int | None, halo: int) -> None:
    kind = {"window": window}
    compare(inputs(20, 20 + halo), attend, documents=None, **kind)
    for before in (0, 3, 100):  # of the one document's tokens lie before the piece, in every row
        p = torch.arange(before, before + 20).expand(2, -1).contiguous()
        compare(inputs(20, 20 + halo), attend, documents=Documents.from_positions(p), **kind)
    p = positions(2, 20, [[0, 6, 15], [0]])
    for begins in ((3, 100), (0, 2), (100, 0)):  # differently in each row
        p[0, :6], p[1] = torch.arange(6) + begins[0], torch.arange(20) + begins[1]
        documents = Documents.from_positions(p)
        for given in (documents, documents.padded(4), documents.padded(7)):
            compare(inputs(20, 20 + halo), attend, documents=given, **kind)


def test_slices_of_one_product(attend: Any) -> None:
    """As the projections give them: queries, keys and values side by side."""
    joint = torch.randn(2, 20, 8, 8, dtype=torch.float64, requires_grad=True)
    documents = Documents.from_positions(positions(2, 20, [[0, 6], [0]]))
    compare(list(joint.split([4, 2, 2], dim=2)), attend, documents=documents, window=5)


@pytest.fixture
def fake4(monkeypatch: pytest.MonkeyPatch) -> Flash4:
    return Flash4(monkeypatch)


@pytest.mark.parametrize(("window", "forwards"), [(None, 1), (5, 2)])
def test_full_recomputation_keeps_global_attention(fake4: Flash4, window: int | None, forwards: int) -> None:
    tensors, attend = inputs(20, 24), load("flash4")

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(AttentionInputs(q.sin(), k.sin(), v.sin(), window=window)).cos()

    want = torch.autograd.grad(block(*tensors).sum(), tensors)
    fake4.forwards.clear()
    out = checkpoint(block, *tensors, use_reentrant=False, context_fn=_keeping)
    got = torch.autograd.grad(out.sum(), tensors)
    assert len(fake4.forwards) == forwards
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


def test_a_model_trains_alike_whatever_is_recomputed(fake4: Flash4, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusiontree.ops.attention.flash._HALF", (torch.float32,))
    monkeypatch.setitem(vars(ATTENTION.backends["flash4"]), "unavailable", lambda device: None)
    monkeypatch.setattr(rooms, "_fitting", rooms._fitting.__wrapped__)  # which remembers what there is
    monkeypatch.setattr(ATTENTION, "choose", ATTENTION._choose)
    ids = torch.arange(64).view(2, 32) % 40
    documents = Documents.from_positions(positions(2, 32, [[0, 11, 20], [0]]))

    def gradients(mode: str, backend: str) -> list[Tensor]:
        model = tiny_model(layer_pattern="FA", window_size=8, head_dim=16, kernels={"attention": backend})
        checkpoint_activations(model, mode)
        model(ids, labels_BS=ids, documents=documents).loss_sum.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain = gradients("none", "flash4")
    torch.testing.assert_close(plain, gradients("none", "reference"), rtol=1e-3, atol=1e-5)
    for mode in ("selective", "full"):
        fake4.forwards.clear()
        assert all(torch.equal(mine, other) for mine, other in zip(gradients(mode, "flash4"), plain, strict=True))
        # Two layers, each with a window of 8 and a part that sees everything.
        assert fake4.forwards == [7, None, 7, None] + ([7, 7] if mode == "full" else [])


def test_a_step_after_an_evaluation_of_the_same_rows(fake4: Flash4) -> None:
    documents = Documents.from_positions(positions(2, 20, [[0, 6], [0]]))
    with torch.inference_mode():
        load("flash4")(AttentionInputs(*(t.detach() for t in inputs(20, 23)), documents=documents))
    compare(inputs(20, 23), load("flash4"), documents=documents)


def test_torch_compile_sees_an_operation(fake4: Flash4) -> None:
    tensors, attend = inputs(20, 24), load("flash4")

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(AttentionInputs(q * 2, k, v, window=5)) * 3

    want = torch.autograd.grad(block(*tensors).sum(), tensors)
    got = torch.autograd.grad(torch.compile(block, backend="aot_eager", fullgraph=True)(*tensors).sum(), tensors)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("installed", "dtype", "width", "length", "name"),
    [
        ("flash4", torch.bfloat16, 128, 256, "flash4"),
        ("flash4", torch.bfloat16, 128, 77, "flash4"),
        ("flash4", torch.bfloat16, 256, 256, "flex"),
        ("flash4", torch.bfloat16, 12, 256, "sdpa"),
        ("flash4", torch.float32, 128, 256, "flex"),
        ("flash4", torch.float32, 128, 77, "sdpa"),
        ("varlen", torch.bfloat16, 128, 256, "flex"),
        ("varlen", torch.bfloat16, 128, 77, "sdpa"),
    ],
)
def test_auto_takes_the_fastest_with_kernels_for_the_heads(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    installed: str,
    dtype: torch.dtype,
    width: int,
    length: int,
    name: str,
) -> None:
    caplog.set_level(logging.INFO)

    def chosen(wanted: str, device_type: str) -> Any:
        runs = [n for n, b in ATTENTION.backends.items() if b.unavailable(torch.device("cpu")) is None]
        return lambda q, *others, **kind: runs[0] if wanted == "auto" else wanted

    for key, backend in ATTENTION.backends.items():
        there = key in (installed, "flex", "sdpa", "reference")
        monkeypatch.setitem(vars(backend), "unavailable", lambda device, there=there: None if there else "missing")
    monkeypatch.setattr(ATTENTION, "choose", chosen)
    rooms._fitting.cache_clear()
    try:
        q = torch.zeros(1, length, 2, width, dtype=dtype)
        assert attention(q, q, q) == name
        assert ("backend flex is not used" in caplog.text) == (name == "sdpa")
    finally:
        rooms._fitting.cache_clear()


def test_a_named_package_without_such_kernels_is_an_error() -> None:
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(UserError, match=r"kernels\.attention=flash4 .* not in float32; kernels\.attention=auto can"):
        attention(q, q, q, backend="flash4")
    with pytest.raises(UserError, match="multiple of 8 channels up to 128, not 136"):
        attention(*[torch.zeros(1, 4, 2, 136).bfloat16()] * 3, backend="flash4")


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    why = partial(PACKAGES["flash4"].unavailable, torch.device("cuda"))
    install(monkeypatch, "flash_attn.cute.interface")  # flash-attn 2 has a folder of that name
    assert why() == "flash-attn-4 is not installed (pip install 'fusiontree[cuda]')"
    Flash4(monkeypatch)
    assert why() is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert why() == "it has no kernels for GPUs of compute capability 8.0"
    assert PACKAGES["flash4"].unavailable(torch.device("cpu")) == "its kernels need a GPU"


def test_flash_attn_2_over_4_is_named_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both bring a folder flash_attn/cute, and the one installed last is found."""
    Flash4(monkeypatch)
    load("flash4")

    def older(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None: ...

    install(monkeypatch, "flash_attn.cute.interface", _flash_attn_fwd=older)
    with pytest.raises(UserError, match=r"is of another version, perhaps of flash-attn 2.*force-reinstall"):
        load("flash4")
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", None)
    with pytest.raises(UserError, match=r"cannot be used: import of flash_attn.cute.interface halted"):
        load("flash4")


@pytest.mark.parametrize(("removed", "used"), [("flash2", "varlen"), ("flash3", "auto")])
def test_a_removed_backend_is_replaced_with_a_warning(
    removed: str, used: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert KernelsConfig(attention=removed).attention == used
    assert f"kernels.attention={removed} no longer exists; using {used}" in caplog.text
