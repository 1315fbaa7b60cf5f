"""The gated delta rule by scan chunks against its recurrence in float64: outputs, final states and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusiontree.ops.documents import Documents
from fusiontree.ops.gated_delta import fla as adapter
from fusiontree.ops.gated_delta import gated_delta_rule
from fusiontree.ops.gated_delta.formulas import norm_then_gate, unit_length
from fusiontree.ops.gated_delta.reference import DeltaInputs
from fusiontree.utils.errors import UserError
from tests.ops.test_ssd import positions

SHAPE = (2, 4, 3, 5)
"""Rows, value heads, key channels, value channels."""


def inputs(length: int, groups: int = 2, decay: float = 0.1, seed: int = 0) -> dict[str, Tensor]:
    rows, heads, size, width = SHAPE
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    values = {
        "q": unit_length(rand(rows, length, groups, size)),
        "k": unit_length(rand(rows, length, groups, size)),
        "v": rand(rows, length, heads, width),
        "log_decay": -decay * rand(rows, length, heads).abs(),
        "beta": rand(rows, length, heads).sigmoid(),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


def sequential(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    docs: Documents | None,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Multiply the matrices of the definition, independent of the product's forms."""
    _, heads, size, _ = SHAPE
    q, k = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (q, k))
    state = v.new_zeros(SHAPE) if initial is None else initial
    outputs = []
    for t in range(v.shape[1]):
        if docs is not None:
            state = state * (docs.positions_BS[:, t] != 0)[:, None, None, None]
        writes = beta[:, t, :, None, None] * k[:, t, :, :, None]
        forget = torch.eye(size, dtype=v.dtype) - writes @ k[:, t, :, None, :]
        state = forget @ (log_decay[:, t].exp()[..., None, None] * state) + writes @ v[:, t, :, None, :]
        outputs.append((state.transpose(-1, -2) @ q[:, t, :, :, None])[..., 0] * size**-0.5)
    return torch.stack(outputs, 1), state


def compare(values: dict[str, Tensor], got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], *more: Tensor) -> None:
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g, dtype=t.dtype) for t in want]
    leaves = [*values.values(), *more]
    results = []
    for pair in (got, want):
        loss = sum((t * w).sum() for t, w in zip(pair, weights, strict=True))
        results.append([*pair, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("decay", [3.0, 0.01, 0.0])
@pytest.mark.parametrize(("length", "chunk"), [(16, 4), (37, 8), (5, 8), (1, 4)])
def test_equals_the_definition(length: int, chunk: int, decay: float, backend: str) -> None:
    values = inputs(length, decay=decay)
    got = gated_delta_rule(*values.values(), chunk_size=chunk, backend=backend)
    compare(values, got, sequential(*values.values(), None, None))


@pytest.mark.parametrize("groups", [1, 4])
def test_value_heads_share_keys(groups: int) -> None:
    values = inputs(19, groups)
    compare(values, gated_delta_rule(*values.values(), chunk_size=8), sequential(*values.values(), None, None))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("offset", [0, 5])
@pytest.mark.parametrize("chunk", [4, 64])
def test_documents_restart_the_state(chunk: int, offset: int, backend: str) -> None:
    """Documents that start on, before and after chunk borders; with an offset the rows continue the initial state."""
    p = positions(2, 37, [[0, 3, 4, 8, 25, 36], [0, 17]])
    p[0, :3] += offset
    p[1, :17] += offset
    documents = Documents.from_positions(p)
    values = inputs(37, decay=0.02)
    initial = torch.randn(*SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    arguments: dict[str, Any] = {"documents": documents, "initial_state_BHKV": initial, "backend": backend}
    got = gated_delta_rule(*values.values(), chunk_size=chunk, **arguments)
    compare(values, got, sequential(*values.values(), documents, initial), initial)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("starts", [[[0]], [[0, 12], [0, 5, 24]], [[0, 11, 13, 23, 25], [0, 1]]])
def test_chunks_that_exchange_states_equal_the_whole_row(starts: list[list[int]], backend: str) -> None:
    """Context parallelism in one process: three chunks of 12 tokens, states folded from left to right."""
    values = inputs(36, decay=0.02)
    p = positions(2, 36, starts)
    state, outputs = torch.zeros(SHAPE, dtype=torch.float64), []
    for begin in range(0, 36, 12):
        part = slice(begin, begin + 12)
        maps: list[Tensor] = []

        def exchange(reached: Tensor, transition: Tensor, before: Tensor = state, maps: list = maps) -> Tensor:
            maps.extend((reached, transition))
            return before

        y, final = gated_delta_rule(
            *(v[:, part] for v in values.values()),
            chunk_size=5,
            documents=Documents.from_positions(p[:, part]),
            state_exchange=exchange,
            backend=backend,
        )
        reached, transition = maps
        state, outputs = reached + transition @ state, [*outputs, y]
        torch.testing.assert_close(final, state, rtol=1e-9, atol=1e-9)
    want = sequential(*values.values(), Documents.from_positions(p), None)
    compare(values, (torch.cat(outputs, 1), state), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_one_by_one_equal_the_row(dtype: torch.dtype) -> None:
    values = {n: v.detach().to(dtype if n in "qkv" else torch.float32) for n, v in inputs(9).items()}
    want, want_state = gated_delta_rule(*values.values(), chunk_size=4)
    state, outputs = None, []
    for t in range(9):
        y, state = gated_delta_rule(*(v[:, t : t + 1] for v in values.values()), initial_state_BHKV=state)
        assert y.dtype == dtype and state.dtype == torch.float32
        outputs.append(y)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(torch.cat(outputs, 1), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state, want_state, rtol=tolerance, atol=tolerance)


def test_the_norm_is_of_each_head_and_before_the_gate() -> None:
    g = torch.Generator().manual_seed(0)
    y, z, weight = (torch.randn(*shape, generator=g) for shape in ((1, 2, 3, 4), (1, 2, 12), (12,)))
    want = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    want = want.flatten(2) * weight * z * torch.sigmoid(z)
    torch.testing.assert_close(norm_then_gate(y, z, weight, 1e-5), want)


# fla's kernels: what is called, and where


def kernel(**given: Any) -> tuple[Tensor, Tensor]:
    """Stand for fla's function, which knows no documents: state and outputs in the arguments' names of fla."""
    tensors = (given[name] for name in ("q", "k", "v", "g", "beta"))
    return gated_delta_rule(*tensors, initial_state_BHKV=given["initial_state"], backend="chunked")


@pytest.mark.parametrize("offset", [0, 5])
def test_a_decay_of_zero_restarts_the_state_in_fla(offset: int) -> None:
    p = positions(2, 37, [[0, 3, 4, 8, 25, 36], [0, 17]])
    p[0, :3] += offset
    values = {n: v.detach().float().requires_grad_() for n, v in inputs(37, decay=0.02).items()}
    initial = torch.randn(*SHAPE, generator=torch.Generator().manual_seed(3)).requires_grad_()
    documents = Documents.from_positions(p)
    results = []
    for run in (lambda i: adapter.run_kernels(kernel, i), adapter.gated_delta_chunked):
        out = run(DeltaInputs(*values.values(), 64, documents, initial))
        loss = sum(t.square().sum() for t in out)
        results.append([*out, *torch.autograd.grad(loss, [*values.values(), initial])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)  # five starts in a chunk


@pytest.mark.parametrize(
    ("capability", "triton", "wrong"),
    [
        ((9, 0), "3.6.0", True),
        ((9, 0), "3.4.0", True),
        ((9, 0), "3.7.0+git12", True),
        ((9, 0), "3.7.1", False),
        ((9, 0), "3.3.1", False),
        ((9, 0), "4.0", False),
        ((10, 0), "3.6.0", False),
        ((8, 0), "3.6.0", False),
    ],
)
def test_where_triton_compiles_the_backward_kernel_wrongly(
    capability: tuple[int, int], triton: str, wrong: bool
) -> None:
    assert adapter.compiled_wrongly(capability, triton) is wrong


def test_no_tile_has_the_width_that_is_compiled_wrongly() -> None:
    for size in (8, 16, 24, 32, 48, 64, 96, 128, 256):
        assert adapter.safe_tile(size) in (16, 32, 128)


def test_wrong_gradients_are_measured() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * 1.5

    def with_wrong_keys(**given: Any) -> tuple[Tensor, Tensor]:
        return kernel(**given | {"k": Wrong.apply(given["k"])})

    def error(function: Callable) -> float:
        run = lambda i: adapter.run_kernels(function, i)  # noqa: E731
        return adapter.gradient_errors(run, torch.device("cpu"), (1, 2), (16, 16), torch.bfloat16)

    assert error(kernel) < 0.02
    assert error(with_wrong_keys) == pytest.approx(0.5, rel=0.05)


def test_a_missing_package_and_too_wide_keys_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "find_spec", lambda name: None if name == "fla" else object())
    assert adapter.unavailable(torch.device("cuda")) == "fla is not installed (pip install 'fusiontree[cuda]')"
    monkeypatch.setattr(adapter, "find_spec", lambda name: object())
    for found, usable in (("0.5.2", False), ("0.6.0", True), ("0.6.3", True), ("0.7.0", False)):
        monkeypatch.setattr(adapter, "version", lambda name, found=found: found)
        assert (adapter.unavailable(torch.device("cuda")) is None) is usable, found
    assert adapter.unavailable(torch.device("cpu")) == "its kernels need a GPU"
    wide = [torch.zeros(1, 2, 1, 512)] * 3 + [torch.zeros(1, 2, 1)] * 2
    with pytest.raises(UserError, match=r"no kernel for keys of 512 channels; set .*key_dim to at most 256"):
        adapter.gated_delta_fla(DeltaInputs(*wide))
