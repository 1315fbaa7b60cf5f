"""GPU backends against the references: outputs, gradients, states; packing, slow decay, long rows.

The bar in bf16: no further from the float32 reference than twice what the reference itself is when run in bf16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fusiontree.ops.attention import ATTENTION, attention, flash4
from fusiontree.ops.conv import causal_conv1d
from fusiontree.ops.cross_entropy import linear_cross_entropy
from fusiontree.ops.documents import Documents
from fusiontree.ops.gate import gate_mix
from fusiontree.ops.gelu import AGAIN_AND_GRADIENT
from fusiontree.ops.norm import gated_rms_norm, residual_rms_norm, rms_norm
from fusiontree.ops.rotary import apply_rotary, rotary_tables, rotate_and_cut
from fusiontree.ops.ssd import ssd_scan
from fusiontree.parallel.activation_checkpointing import _keeping, checkpoint_activations
from tests.helpers import tiny_model
from tests.ops.test_ssd import positions

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
needs_mamba = pytest.mark.skipif(find_spec("mamba_ssm") is None, reason="mamba_ssm is not installed")


def _attention_backends() -> list:
    there = torch.cuda.is_available()
    device, names = torch.device("cuda"), [name for name in ATTENTION.backends if name != "reference"]
    why = {name: ATTENTION.backends[name].unavailable(device) if there else None for name in names}
    return [pytest.param(n, marks=pytest.mark.skipif(bool(why[n]), reason=f"{n}: {why[n]}")) for n in names]


attentions = pytest.mark.parametrize("name", _attention_backends())
scans = pytest.mark.parametrize("scan", ["triton", pytest.param("mamba_ssm", marks=needs_mamba)])


def documents(length: int, packed: bool) -> Documents:
    starts = [[0, 3, length // 3, length // 2 + 1], [0, length // 5]] if packed else [[0]]
    return Documents.from_positions(positions(2, length, starts)).to("cuda")


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-12))


def check(fast: Callable, reference: Callable, inputs: list[torch.Tensor], floor: float = 2e-3) -> None:
    """Compare results and gradients of both in bf16 with the reference in float32."""

    def results(run: Callable, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.detach().to(dtype if t.dtype != torch.float64 else torch.float32).requires_grad_() for t in inputs]
        out = run(*leaves)
        outputs = list(out) if isinstance(out, tuple) else [out]
        g = torch.Generator("cuda").manual_seed(5)
        loss = sum((o.float() * torch.randn(o.shape, generator=g, device="cuda")).sum() for o in outputs)
        return outputs + list(torch.autograd.grad(loss, leaves))

    want = results(reference, torch.float32)
    bar = [error(r, w) for r, w in zip(results(reference, torch.bfloat16), want, strict=True)]
    got = [error(r, w) for r, w in zip(results(fast, torch.bfloat16), want, strict=True)]
    for index, (mine, theirs) in enumerate(zip(got, bar, strict=True)):
        assert mine <= 2 * theirs + floor, f"result {index}: error {mine:.2e}, the reference's own {theirs:.2e}"


def attending(name: str, window: int | None, docs: Documents | None) -> Callable:
    return lambda q, k, v: attention(q, k, v, window=window, documents=docs, backend=name)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


@scans
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", [(1.0, 16.0), (0.01, 0.02)])
@pytest.mark.parametrize("length", [1024, 1000])
def test_ssd(packed: bool, decay: tuple[float, float], length: int, scan: str) -> None:
    docs = documents(length, packed)
    heads, width, size, groups = 8, 64, 128, 2
    low, high = decay
    x, b, c = (
        draw(2, length, heads, width),
        draw(2, length, groups, size, seed=1),
        draw(2, length, groups, size, seed=2),
    )
    # float64 marks what stays fp32 in every run: step sizes, decay, skip.
    dt = (torch.nn.functional.softplus(draw(2, length, heads, seed=3) - 4)).double()
    A = -(low + (high - low) * torch.rand(heads, device="cuda")).double()
    D = draw(heads, seed=4).double()

    def run(backend: str) -> Callable:
        return lambda x, dt, A, b, c, D: ssd_scan(x, dt, A, b, c, D, chunk_size=256, documents=docs, backend=backend)

    check(run(scan), run("reference"), [x, dt, A, b, c, D], floor=6e-3)


@scans
@pytest.mark.parametrize("starts", [[[0]], [[0, 300], [0, 100, 700]], [[0, 256, 511], [0, 512]]])
def test_ssd_pieces_that_exchange_states(starts: list[list[int]], scan: str) -> None:
    """Three pieces of a row, the state folded from left to right, equal the whole row: outputs and gradients."""
    length, piece, heads = 768, 256, 8
    p = positions(2, length, starts)
    leaves = [draw(2, length, heads, 64), torch.rand(2, length, heads, device="cuda") * 0.1]
    leaves += [-0.01 - 0.02 * torch.rand(heads, device="cuda"), draw(2, length, 2, 128, seed=1)]
    leaves += [draw(2, length, 2, 128, seed=2), draw(heads, seed=4)]
    weight = draw(2, length, heads, 64, seed=5)

    def in_pieces(*values: torch.Tensor) -> torch.Tensor:
        state, outputs = torch.zeros(2, heads, 64, 128, device="cuda"), []
        for begin in range(0, length, piece):
            part = slice(begin, begin + piece)
            x, dt, A, B, C, D = (v if v.dim() == 1 else v[:, part] for v in values)
            kept: list[torch.Tensor] = []

            def exchange(reached: torch.Tensor, decay: torch.Tensor, before=state, kept=kept) -> torch.Tensor:
                kept.extend((reached, decay))
                return before + 0 * reached  # on one rank the state before does not depend on this piece

            docs = Documents.from_positions(p[:, part].contiguous()).to("cuda")
            y, state = ssd_scan(x, dt, A, B, C, D, chunk_size=64, documents=docs, state_exchange=exchange, backend=scan)
            outputs.append(y)
            state = state.detach()
        return torch.cat(outputs, 1)

    def whole(*values: torch.Tensor) -> torch.Tensor:
        return ssd_scan(*values, chunk_size=64, documents=Documents.from_positions(p).to("cuda"), backend="reference")[
            0
        ]

    inputs = [v.detach().bfloat16().float().requires_grad_() for v in leaves]
    with torch.no_grad():
        got = in_pieces(*(v.bfloat16() if v.dim() == 4 else v for v in inputs))
    want = whole(*inputs)
    assert error(got, want) < 1e-2
    # The last piece's gradients do not pass through a state: they must be the whole row's.
    last = slice(length - piece, length)
    (want[:, last] * weight[:, last]).sum().backward()
    found = [v.detach().clone().requires_grad_() for v in inputs]
    low = [v.bfloat16() if v.dim() == 4 else v for v in found]
    (in_pieces(*low)[:, last].float() * weight[:, last]).sum().backward()
    for index in (0, 1, 3, 4):
        assert error(found[index].grad[:, last], inputs[index].grad[:, last]) < 2e-2, f"gradient {index}"


@scans
def test_ssd_gradient_through_an_exchange(scan: str) -> None:
    """The state to begin with is a function of what the piece reaches and of its decay, as under cp."""
    heads, length = 4, 256
    leaves = [draw(1, length, heads, 64), torch.rand(1, length, heads, device="cuda") * 0.05]
    leaves += [-0.01 - 0.02 * torch.rand(heads, device="cuda"), draw(1, length, 1, 128, seed=1)]
    leaves += [draw(1, length, 1, 128, seed=2), draw(heads, seed=4)]
    other, weight = draw(1, heads, 64, 128, seed=6), draw(1, length, heads, 64, seed=5)

    def exchange(reached: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        return other.to(reached.dtype) * decay[..., None, None] + 0.3 * reached.flip(1)

    grads = []
    for backend, dtype in (("reference", torch.float64), (scan, torch.bfloat16)):
        inputs = [v.bfloat16().double().requires_grad_() for v in leaves]
        low = [v.to(dtype) if v.dim() == 4 else v.to(torch.promote_types(dtype, torch.float32)) for v in inputs]
        y, state = ssd_scan(*low, chunk_size=64, state_exchange=exchange, backend=backend)
        ((y.double() * weight).sum() + (state.double() * other).sum()).backward()
        grads.append([y, *(v.grad for v in inputs)])
    for index, (mine, theirs) in enumerate(zip(grads[1], grads[0], strict=True)):
        assert error(mine, theirs) < 2e-2, f"result {index}"


@scans
def test_ssd_of_a_row_of_128k_equals_its_halves(scan: str) -> None:
    """The benchmark's sizes: offsets of every kernel stay within 32 bits, or a half would differ from the whole."""
    length, half = 1 << 17, 1 << 16
    x = draw(1, length, 64, 64).bfloat16()
    B, C = draw(1, length, 8, 128, seed=1).bfloat16(), draw(1, length, 8, 128, seed=2).bfloat16()
    dt = torch.rand(1, length, 64, device="cuda") * 0.1
    A, D = -0.01 - torch.rand(64, device="cuda"), draw(64, seed=4)
    inputs = [v.requires_grad_() for v in (x, dt, B, C)]

    def run(part: slice, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        x, dt, B, C = (v[:, part] for v in inputs)
        return ssd_scan(x, dt, A, B, C, D, chunk_size=256, initial_state_BHPN=state, backend=scan)

    whole, _ = run(slice(None), None)
    first, state = run(slice(0, half), None)
    second, _ = run(slice(half, length), state)
    assert error(second, whole[:, half:]) < 1e-3
    g = draw(1, length, 64, 64, seed=3).bfloat16()
    want = torch.autograd.grad(whole, inputs, g)
    got = torch.autograd.grad(torch.cat([first, second], 1), inputs, g)
    for mine, theirs in zip(got, want, strict=True):
        assert error(mine, theirs) < 1e-2


@needs_mamba
def test_ssd_refuses_rows_beyond_its_offsets() -> None:
    big = torch.empty(1, 1, 1, 1, device="cuda", dtype=torch.bfloat16)
    x, bc = big.expand(1, 1 << 20, 64, 64), big.expand(1, 1 << 20, 8, 128)
    dt = torch.empty(1, 1, 1, device="cuda").expand(1, 1 << 20, 64)
    vector = torch.ones(64, device="cuda")
    with pytest.raises(ValueError, match="beyond the 32 bits"):
        ssd_scan(x, dt, -vector, bc, bc, vector, chunk_size=256, backend="mamba_ssm")


@attentions
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 128, 300])
@pytest.mark.parametrize(("length", "heads", "kv_heads", "width"), [(1024, 4, 2, 64), (1024, 4, 4, 128)])
def test_attention(
    name: str, packed: bool, window: int | None, length: int, heads: int, kv_heads: int, width: int
) -> None:
    docs = documents(length, packed)
    q = draw(2, length, heads, width)
    k, v = (draw(2, length, kv_heads, width, seed=seed) for seed in (1, 2))
    check(attending(name, window, docs), attending("reference", window, docs), [q, k, v])


@attentions
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "window"), [(12, 6, 1024), (4, 2, None)])
def test_attention_of_the_benchmarks_heads(
    name: str, heads: int, kv_heads: int, window: int | None, packed: bool
) -> None:
    docs = documents(4096, packed)
    q = draw(2, 4096, heads, 128)
    k, v = (draw(2, 4096, kv_heads, 128, seed=seed) for seed in (1, 2))
    check(attending(name, window, docs), attending("reference", window, docs), [q, k, v])


@attentions
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("before", [256, 3072])
def test_attention_of_a_rows_last_tokens(name: str, before: int, window: int | None) -> None:
    queries = 1024
    pieces = Documents.from_positions(torch.arange(before, before + queries).expand(2, -1).contiguous()).to("cuda")
    q = draw(2, queries, 4, 128)
    k, v = (draw(2, before + queries, 2, 128, seed=seed) for seed in (1, 2))
    check(attending(name, window, pieces), attending("reference", window, pieces), [q, k, v])


@attentions
@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("before", [256, 1000])
def test_attention_of_a_piece_of_packed_rows(name: str, before: int, window: int | None) -> None:
    """Keys of other documents before the queries get no gradient, whatever lay in the memory that it is written to."""
    queries = 1024
    p = positions(2, queries, [[0, 300, 301, 900], [0, 640]])
    p[0, :300] += 100  # continues a document of which not all keys before the queries are
    p[1, :640] += 5000
    pieces = Documents.from_positions(p).to("cuda")
    q = draw(2, queries, 4, 128)
    k, v = (draw(2, before + queries, 2, 128, seed=seed) for seed in (1, 2))
    dirty = [torch.full((1 << 24,), float("nan"), device="cuda") for _ in range(4)]
    del dirty
    check(attending(name, window, pieces), attending("reference", window, pieces), [q, k, v])
    leaf = k.bfloat16().requires_grad_()
    attending(name, window, pieces)(q.bfloat16(), leaf, v.bfloat16()).float().sum().backward()
    assert leaf.grad is not None
    assert not leaf.grad[0, : before - 100].any()


@attentions
@pytest.mark.parametrize("length", [77, 1000])
def test_attention_of_prompts_of_odd_lengths(name: str, length: int) -> None:
    if name == "flex":
        pytest.skip("attention() does not ask it: it would compile for each length")
    q = draw(2, length, 4, 128)
    k, v = (draw(2, length, 2, 128, seed=seed) for seed in (1, 2))
    for window in (None, 64):
        check(attending(name, window, None), attending("reference", window, None), [q, k, v])


@attentions
@pytest.mark.parametrize("window", [None, 1024])
def test_attention_of_a_row_of_128k(name: str, window: int | None) -> None:
    """Its last tokens, against the definition computed for them alone, and the gradients against FlexAttention's."""
    length, tail = 1 << 17, 256
    q = draw(1, length, 2, 128).bfloat16().requires_grad_()
    k, v = (draw(1, length, 1, 128, seed=seed).bfloat16().requires_grad_() for seed in (1, 2))
    g = draw(1, length, 2, 128, seed=3).bfloat16()
    out = attending(name, window, None)(q, k, v)
    last = attending("reference", window, None)(q[:, -tail:].float(), k.float(), v.float())
    assert error(out[:, -tail:], last) < 1e-2
    got = torch.autograd.grad(out, (q, k, v), g)
    want = torch.autograd.grad(attending("flex", window, None)(q, k, v), (q, k, v), g)
    for mine, theirs in zip(got, want, strict=True):
        assert error(mine, theirs) < 2e-2


def test_full_recomputation_keeps_flash_attention() -> None:
    missing = ATTENTION.backends["flash4"].unavailable(torch.device("cuda"))
    if missing:
        pytest.skip(missing)
    q, k, v = (draw(1, 1024, h, 128, seed=h).bfloat16().requires_grad_() for h in (4, 2, 2))

    def block(*x: torch.Tensor) -> torch.Tensor:
        return attending("flash4", None, None)(*(t * 2 for t in x)) * 3

    want = torch.autograd.grad(block(q, k, v).float().sum(), (q, k, v))
    calls = 0
    kept = checkpoint(block, q, k, v, use_reentrant=False, context_fn=_keeping)
    forward = flash4._package()._flash_attn_fwd

    @functools.wraps(forward)
    def count(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        return forward(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash4._package(), "_flash_attn_fwd", count)
        got = torch.autograd.grad(kept.float().sum(), (q, k, v))
    assert calls == 0
    for mine, theirs in zip(got, want, strict=True):
        assert error(mine, theirs) < 1e-2


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["triton", "compiled"])
def test_conv(name: str, packed: bool) -> None:
    docs = documents(1000, packed)
    inputs = [draw(2, 1000, 96), draw(96, 4, seed=1), draw(96, seed=2)]

    def run(backend: str) -> Callable:
        return lambda x, w, b: causal_conv1d(x, w, b, documents=docs, backend=backend)

    check(run(name), run("reference"), inputs)


@pytest.mark.parametrize("name", ["triton", "compiled"])
def test_gelu_recomputed_with_its_gradient(name: str) -> None:
    x, dy = 3 * draw(2, 1000, 300), draw(2, 1000, 300, seed=1)
    for dtype in (torch.float32, torch.bfloat16):
        found, expected = (
            AGAIN_AND_GRADIENT.choose(backend, "cuda")(x.to(dtype), dy.to(dtype)) for backend in (name, "reference")
        )
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_norms_and_rotary() -> None:
    x, z, weight = draw(2, 500, 256), draw(2, 500, 256, seed=1), draw(256, seed=2)
    for name in ("auto", "compiled"):
        check(
            lambda x, w, name=name: rms_norm(x, w, 1e-5, backend=name),
            lambda x, w: rms_norm(x, w, 1e-5, backend="reference"),
            [x, weight],
        )
        check(
            lambda x, w, name=name: residual_rms_norm(x + 0, w, 1e-5, backend=name),
            lambda x, w: residual_rms_norm(x + 0, w, 1e-5, backend="reference"),
            [x, weight],
        )
        check(
            lambda x, w, name=name: residual_rms_norm(x + 0, w, 1e-5, 2, backend=name),
            lambda x, w: residual_rms_norm(x + 0, w, 1e-5, 2, backend="reference"),
            [x, weight],
        )

    def gated(backend: str) -> Callable:
        return lambda y, z, w: gated_rms_norm(y, z, w, groups=4, eps=1e-5, backend=backend)

    for name in ("triton", "compiled"):
        check(gated(name), gated("reference"), [x, z, weight])
    cos, sin = rotary_tables(torch.arange(500, device="cuda").unsqueeze(0), 64, 10000.0)

    def rotated(backend: str) -> Callable:
        return lambda q: apply_rotary(q, cos, sin, backend=backend)

    check(rotated("compiled"), rotated("reference"), [draw(2, 500, 4, 64)])

    def cut(backend: str, first: tuple[int, int]) -> Callable:
        def parts(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
            queries, keys = rotate_and_cut(q, k, cos, sin, first, backend=backend)
            return tuple(part for part in (*queries, *keys) if part.numel())

        return parts

    for first in ((3, 1), (4, 2), (0, 0)):
        for name in ("auto", "compiled"):
            given = [draw(2, 500, 4, 64), draw(2, 500, 2, 64, seed=1)]
            check(cut(name, first), cut("reference", first), given)


@pytest.mark.parametrize("packed", [False, True])
def test_conv_of_a_slice_of_a_long_row_beyond_32_bits(packed: bool) -> None:
    """The mixer's x is a slice of its projection; at 2^18 tokens of 8,256 channels its offsets pass 2^31."""
    length, stride, channels = 1 << 18, 8256, 64
    wide = torch.empty(1, length, stride, device="cuda", dtype=torch.bfloat16)
    x = wide[..., 4096 : 4096 + channels]
    x.copy_(draw(1, length, channels))
    docs = Documents.from_positions(positions(1, length, [[0, length // 3, length - 7]])).to("cuda") if packed else None
    weight, bias = draw(channels, 4, seed=1), draw(channels, seed=2)
    got = causal_conv1d(x, weight, bias, documents=docs, backend="triton")
    want = causal_conv1d(x.float(), weight, bias, documents=docs, backend="reference")
    torch.testing.assert_close(got.float(), want, atol=2e-2, rtol=2e-2)


def test_linear_cross_entropy() -> None:
    labels = torch.randint(0, 1111, (700,), device="cuda", generator=torch.Generator("cuda").manual_seed(3))
    labels[::7] = -100

    def run(backend: str) -> Callable:
        return lambda h, w: linear_cross_entropy(h, w, labels, chunk_tokens=256, backend=backend)

    check(run("chunked"), run("reference"), [draw(700, 64), draw(1111, 64, seed=1)])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["both", "first", "second"])
def test_gate_mix(kind: str, padded: bool) -> None:
    counted = (torch.arange(100, device="cuda") < 60).expand(2, -1) if padded else None

    def run(backend: str) -> Callable:
        def mixed(logits: torch.Tensor, branches: torch.Tensor) -> tuple[torch.Tensor, ...]:
            result, sums = gate_mix(logits, branches, counted, given=kind, backend=backend)
            return result, *sums

        return mixed

    inputs = [3 * draw(2, 100, 64), draw(2, 100, 128 if kind == "both" else 64, seed=1)]
    for name in ("auto", "compiled"):
        check(run(name), run("reference"), inputs)


def test_selective_checkpointing_keeps_the_gradients() -> None:
    """Recomputed activations equal the dropped activations bit for bit."""
    grads = []
    for mode in ("none", "selective", "full"):
        model = tiny_model(layer_pattern="FMA", window_size=16, head_dim=16).cuda().bfloat16()
        checkpoint_activations(model, mode)
        ids = torch.arange(128, device="cuda").view(2, 64) % 48
        docs = Documents.from_positions(positions(2, 64, [[0, 11, 40], [0]])).to("cuda")
        model(ids, labels_BS=ids, documents=docs).loss_sum.backward()
        grads.append([p.grad for p in model.parameters()])
    for other in grads[1:]:
        for mine, theirs in zip(other, grads[0], strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or error(mine, theirs) < 1e-2
