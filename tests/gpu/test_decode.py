"""Decoding by a CUDA graph draws the tokens of eager decoding; the one-token operations equal their definitions.

Shape legend: B rows, S tokens.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fusiontree.generation.decoding import generate
from fusiontree.generation.sampling import SamplingConfig
from fusiontree.models.cuda_graph import GraphedStep
from fusiontree.models.fused_step import prepare
from fusiontree.models.weight_only import quantize_weights
from fusiontree.ops.attention import cached_attention, decode_attention, key_bias
from fusiontree.ops.conv import causal_conv1d
from fusiontree.ops.ssd.reference import ssd_step
from tests.helpers import tiny_model
from tests.models.variants import VARIANTS
from tests.ops.sequential_scan import ssd_sequential

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("exact_products"),
]

PROMPTS = [[3, 14, 15, 9, 2, 6, 5, 35, 8, 9, 7, 9, 3, 2, 38, 4], [1], [27, 18, 28, 18, 28], [7] * 9, [11, 12]]
SAMPLING = {
    "greedy": SamplingConfig(greedy=True),
    "drawn": SamplingConfig(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2),
}
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"layer_pattern": "FMAF"},
    "windows of all lengths": {"num_layers": 3, "attention_type": "pyramidal", "window_size_last": 60},
    "no local heads, learned time encoding": {"global_heads": 4, "num_kv_heads": 1, "srte_encoding": "learnable"},
    "sizes of the fast kernels": {
        "layer_pattern": "FMA",
        "scale": 1.0,
        "hidden_size": 256,
        "window_size": 32,
        "mamba": {"head_dim": 64, "d_state": 64, "n_groups": 2, "norm_groups": 2, "chunk_size": 64},
    },
    **{name: VARIANTS[name] for name in ("mean of normalized branches", "sum and MLP in turn")},
}


def both(model: Any, **arguments: Any) -> tuple[Any, Any]:
    eager = generate(model, PROMPTS, max_new_tokens=40, graphs=False, **arguments)
    graphed = generate(model, PROMPTS, max_new_tokens=40, graphs=True, **arguments)
    assert eager.graphed_steps == 0 and graphed.graphed_steps > 0
    return eager, graphed


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("kind", "how"), list(zip(MODELS, ("greedy", "drawn") * 3, strict=True)))
def test_graphs_draw_the_tokens_of_eager_steps(kind: str, how: str, fused: bool) -> None:
    model = tiny_model(**MODELS[kind]).cuda()
    if fused:
        prepare(model)
    free = generate(model, PROMPTS, max_new_tokens=40, graphs=False, sampling=SAMPLING[how])
    stop = sorted({row.tokens[at] for row, at in zip(free.rows[:3], (1, 5, 12), strict=True)})
    eager, graphed = both(model, sampling=SAMPLING[how], stop_tokens=stop)  # rows finish at different times
    for want, got in zip(eager.rows, graphed.rows, strict=True):
        assert (got.tokens, got.finish_reason) == (want.tokens, want.finish_reason)
        assert got.logprobs == pytest.approx(want.logprobs, abs=1e-3)
    again = generate(model, PROMPTS, max_new_tokens=40, sampling=SAMPLING[how], stop_tokens=stop, graphs=True)
    assert [row.tokens for row in again.rows] == [row.tokens for row in graphed.rows]


@pytest.mark.parametrize("weights", ["as they are", "fused", "fused int8", "fused fp8"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("tiny", torch.bfloat16), ("sizes of the fast kernels", torch.bfloat16), ("tiny", torch.float16)],
)
@torch.inference_mode()
def test_graphed_logits_in_half_precision(kind: str, dtype: torch.dtype, weights: str) -> None:
    """The recorded step against fp32, over a cache long enough to be cut in parts: at most twice as far as eager ones.

    The rounding of bf16 alone moves a few of these logits by a tenth.
    """
    model = tiny_model(**{"scale": 1.0, "max_position_embeddings": 4096, **MODELS[kind]}).to("cuda", dtype).eval()
    exact = copy.deepcopy(model).float()
    if "8" in weights:
        for each in (model, exact):
            quantize_weights(each, weights.split()[1])  # type: ignore[arg-type]
    if "fused" in weights:
        prepare(model)
    ids = torch.randint(0, 64, (2, 2100), generator=torch.Generator().manual_seed(0)).cuda()
    graphed, eager, in_fp32 = model.new_cache(2, 2300), model.new_cache(2), exact.new_cache(2)
    for each, cache in ((model, graphed), (model, eager), (exact, in_fp32)):
        each(ids[:, :2070], cache=cache, logits_to_keep=1)
    graphed.fix(2300)
    step = GraphedStep(model, graphed)
    assert graphed.lengths == [2070, 2070]
    errors: dict[str, list[torch.Tensor]] = {"recorded": [], "eager": []}
    for i in range(2070, 2100):
        token = ids[:, i : i + 1]
        truth = exact(token, cache=in_fp32).logits_BSV[:, -1]
        errors["recorded"].append(step(token).float() - truth)
        errors["eager"].append(model(token, cache=eager).logits_BSV[:, -1].float() - truth)
    recorded, plain = (float(torch.stack(of).norm()) for of in errors.values())
    print(f"{kind}, {dtype}, {weights}: error {recorded:.3f} recorded, {plain:.3f} eager")
    assert recorded <= 2 * plain
    assert graphed.lengths == [2100, 2100] == graphed.positions_B.tolist()


def test_recording_copies_no_keys() -> None:
    columns = 1 << 21
    model = tiny_model(layer_pattern="AA", max_position_embeddings=columns).to("cuda", torch.bfloat16).eval()
    with torch.inference_mode():
        cache = model.new_cache(4, columns)
        model(torch.ones(4, 8, dtype=torch.int64, device="cuda"), cache=cache)
        cache.fix(columns)
        kept = cache.layers[0]["attention"].everything.kept
        keys = 2 * kept.k_BTKD.numel() * kept.k_BTKD.element_size()  # and values, of one of two layers: 256 MiB
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step = GraphedStep(model, cache)
        step(torch.ones(4, 1, dtype=torch.int64, device="cuda"))
        assert cache.layers[0]["attention"].everything.kept.k_BTKD.data_ptr() == kept.k_BTKD.data_ptr()
        # Scores, weights and cuBLAS's workspaces come on top of the cache; a second cache alone would be 2 * keys.
        assert torch.cuda.max_memory_allocated() - before < 2 * keys
        assert torch.cuda.memory_allocated() - before < keys


@pytest.mark.parametrize("window", [None, 1500])
@pytest.mark.parametrize("slots", [90, 2304, 4000])
def test_single_queries_in_bf16(slots: int, window: int | None) -> None:
    g = torch.Generator("cuda").manual_seed(0)
    q = 2 * torch.randn(3, 1, 8, 64, generator=g, device="cuda").bfloat16()
    k, v = (torch.randn(3, 2, slots, 64, generator=g, device="cuda").bfloat16().transpose(1, 2) for _ in range(2))
    filled = torch.arange(slots, device="cuda").repeat(3, 1)
    queries = torch.tensor([[slots - 1], [slots // 2], [3]], device="cuda")
    with torch.no_grad():
        got = decode_attention(q, k, v, key_bias(filled, queries, window))
    definition = {"key_positions_BT": filled, "query_positions_BS": queries, "window": window}
    torch.testing.assert_close(got, cached_attention(q, k, v, **definition), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_token_of_scan_and_convolution(dtype: torch.dtype) -> None:
    from fusiontree.ops.elementwise import compiled

    g = torch.Generator("cuda").manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g, device="cuda", dtype=torch.float64)  # noqa: E731
    values = [rand(2, 1, 8, 64), rand(2, 1, 8).exp(), -rand(8).exp(), rand(2, 1, 2, 32), rand(2, 1, 2, 32), rand(8)]
    single = torch.promote_types(dtype, torch.float32)
    values = [v.to(dtype if i in (0, 3, 4) else single) for i, v in enumerate(values)]
    initial = rand(2, 8, 64, 32).to(single)
    want_y, want_state = ssd_sequential(*(v.double() for v in values), initial_state_BHPN=initial.double())
    y, state = compiled(ssd_step)(*values, initial)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    assert y.dtype == dtype and state.dtype == single
    torch.testing.assert_close(y.double(), want_y, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(state.double(), want_state, atol=min(tolerance, 1e-4), rtol=min(tolerance, 1e-4))

    x, weight, bias, before = (
        rand(2, 1, 96).to(dtype),
        rand(96, 4).to(dtype),
        rand(96).to(dtype),
        rand(2, 3, 96).to(dtype),
    )
    got = causal_conv1d(x, weight, bias, initial_BKC=before)
    want = causal_conv1d(torch.cat([before, x], 1).double(), weight.double(), bias.double(), backend="reference")
    torch.testing.assert_close(got.double(), want[:, 3:], atol=tolerance, rtol=tolerance)
