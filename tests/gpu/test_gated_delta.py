"""The gated delta rule by fla-core's kernels against plain PyTorch: outputs, states, gradients; packing and exchange.

The bar in bf16: no further from the float32 reference than twice what the reference itself is when run in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fusiontree.models.mixers.base import MixerInputs
from fusiontree.models.mixers.gated_delta_net import GatedDeltaNet
from fusiontree.ops.documents import Documents
from fusiontree.ops.gated_delta import GATED_DELTA, gated_delta_rule
from fusiontree.ops.gated_delta.fla import gradient_errors
from fusiontree.ops.gated_delta.formulas import unit_length
from fusiontree.ops.gated_delta.reference import DeltaInputs
from tests.gpu.test_ops import check, documents, draw, error
from tests.helpers import tiny_config, tiny_model
from tests.ops.test_ssd import positions

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def _missing() -> str | None:
    return GATED_DELTA.backends["fla"].unavailable(torch.device("cuda")) if torch.cuda.is_available() else None


needs_fla = pytest.mark.skipif(bool(_missing()), reason=f"fla: {_missing()}")


def inputs(length: int, heads: int = 8, groups: int = 4, size: int = 128, width: int = 128) -> list[Tensor]:
    """Queries, keys, values, and in float64, which marks what stays fp32 in every run, log decays and strengths."""
    q, k = (unit_length(draw(2, length, groups, size, seed=seed)) for seed in range(2))
    log_decay = -0.05 * draw(2, length, heads, seed=3).abs()
    return [
        q,
        k,
        draw(2, length, heads, width, seed=2),
        log_decay.double(),
        draw(2, length, heads, seed=4).sigmoid().double(),
    ]


def by(backend: str, docs: Documents | None = None) -> Callable:
    return lambda *values: gated_delta_rule(*values, documents=docs, backend=backend)


@needs_fla
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("size", "width"), [(128, 128), (64, 64), (32, 64), (96, 128), (256, 256)])
@pytest.mark.parametrize("length", [1024, 1000])
def test_fla(length: int, size: int, width: int, packed: bool) -> None:
    docs = documents(length, packed)
    check(by("fla", docs), by("chunked", docs), inputs(length, size=size, width=width), floor=8e-3)


@needs_fla
@pytest.mark.parametrize(("size", "width"), [(16, 16), (32, 32), (64, 64), (128, 128), (128, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_right_with_the_installed_triton(size: int, width: int, dtype: torch.dtype) -> None:
    def scan(given: DeltaInputs) -> tuple[Tensor, Tensor]:
        return GATED_DELTA.choose("fla", "cuda")(given)

    assert gradient_errors(scan, torch.device("cuda", 0), (1, 2), (size, width), dtype) < 0.03


@needs_fla
@pytest.mark.parametrize("starts", [[[0]], [[0, 300], [0, 100, 700]], [[0, 256, 511], [0, 512]]])
def test_chunks_that_exchange_states(starts: list[list[int]]) -> None:
    """Three chunks of a row, the state folded from left to right, equal the whole row."""
    length, piece = 768, 256
    p = positions(2, length, starts)
    values = [v.float().bfloat16() if v.dtype != torch.float64 else v.float() for v in inputs(length)]
    state, outputs = torch.zeros(2, 8, 128, 128, device="cuda"), []
    for begin in range(0, length, piece):
        part = slice(begin, begin + piece)
        docs = Documents.from_positions(p[:, part].contiguous()).to("cuda")
        y, state = gated_delta_rule(
            *(v[:, part].contiguous() for v in values),
            documents=docs,
            state_exchange=lambda reached, transition, before=state: before,
            backend="fla",
        )
        outputs.append(y)
    whole = Documents.from_positions(p).to("cuda")
    want, last = gated_delta_rule(*(v.float() for v in values), documents=whole, backend="chunked")
    assert error(torch.cat(outputs, 1), want) < 1e-2
    assert error(state, last) < 1e-2


@needs_fla
def test_gradients_pass_through_an_exchange() -> None:
    """The initial state depends on the map of the chunk itself, as it depends on other ranks' maps in training."""

    def exchange(reached: Tensor, transition: Tensor) -> Tensor:
        return 0.5 * reached.flip(0) + 0.5 * transition.mean()

    def run(backend: str) -> Callable:
        return lambda *values: gated_delta_rule(*values, state_exchange=exchange, backend=backend)

    check(run("fla"), run("chunked"), inputs(256), floor=1e-2)


MODEL: dict[str, Any] = {
    "layer_pattern": "GD",
    "scale": 1.0,
    "hidden_size": 256,
    "initializer_range": 0.02,
    "letters": {"G": ["gated_delta_net", "attention"], "D": ["gated_delta_net"]},
    "mixers": {"gated_delta_net": {"key_dim": 64, "value_dim": 64}},
}


@torch.no_grad()
@pytest.mark.usefixtures("exact_products")
def test_decoding_equals_the_full_pass() -> None:
    model = tiny_model(**MODEL, kernels={"gated_delta": "chunked"}).cuda()
    ids = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0)).cuda()
    cache = model.new_cache(2)
    parts = [model(ids[:, :20], cache=cache).logits_BSV]
    cache.fix(40)
    parts += [model(ids[:, i : i + 1], cache=cache).logits_BSV for i in range(20, 40)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits_BSV, atol=2e-4, rtol=1e-3)


@needs_fla
def test_the_memory_estimate_is_what_the_kernels_keep() -> None:
    sizes = {"key_dim": 128, "value_dim": 128}
    given = {**MODEL, "layer_pattern": "D", "hidden_size": 1024, "mixers": {"gated_delta_net": sizes}}
    del given["scale"]
    config = tiny_config(**given)
    mixer = GatedDeltaNet(config)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    mixer.bfloat16().cuda()
    weights = {p.untyped_storage().data_ptr() for p in mixer.parameters()}
    kept: dict[int, Tensor] = {}
    length = 2048
    u_BSC = torch.randn(1, length, 1024, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    mixer(u_BSC, MixerInputs())  # compiles and checks
    with saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t):
        mixer(u_BSC, MixerInputs())
    size = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)
    estimated = GatedDeltaNet.activations(config, 1)
    assert estimated.expensive + estimated.cheap == pytest.approx(size / 2 / length - 1024, rel=0.15)


@needs_fla
@pytest.mark.parametrize("packed", [False, True])
def test_the_recurrence_is_recorded_with_documents(packed: bool) -> None:
    """A CUDA graph replays forward and backward for documents other than those it was recorded with."""
    values = [v.detach().to(torch.bfloat16 if v.dtype != torch.float64 else torch.float32) for v in inputs(512)]
    leaves = [v.requires_grad_() for v in values]
    first, later = (Documents.from_positions(positions(2, 512, s)).to("cuda").padded(8) for s in ([[0, 9]], [[0, 300]]))
    docs = first.map(torch.clone) if packed else None

    def step() -> list[Tensor]:
        y, state = gated_delta_rule(*leaves, documents=docs, backend="fla")
        return [y, *torch.autograd.grad(y.float().square().sum() + state.sum(), leaves)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    if docs is not None:
        docs.positions_BS.copy_(later.positions_BS)
    graph.replay()
    for got, want in zip(recorded, step(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
