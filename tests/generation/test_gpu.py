"""Decoding on a GPU: the same tokens as on the CPU, and the reduced precisions run."""

from __future__ import annotations

import pytest
import torch

from fusiontree.generation.decoding import generate
from fusiontree.generation.sampling import SamplingConfig, sample
from tests.helpers import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("exact_products"),
]

PROMPTS = [[3, 14, 15, 9, 2, 6, 5, 35, 8, 9, 7, 9, 3, 2, 38, 4], [1], [27, 18, 28, 18, 28]]
KERNELS = {"attention": "sdpa"}  # heads of 8 channels are too narrow for the fast kernels
SAMPLING = SamplingConfig(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2)


@pytest.mark.parametrize("pattern", ["FFF", "MMM", "AAA", "FMA"])
@pytest.mark.parametrize("window", [3, 64])
def test_fp32_tokens_are_those_of_the_cpu(pattern, window):
    model = tiny_model(layer_pattern=pattern, window_size=window, kernels=KERNELS)
    on_cpu = generate(model, PROMPTS, max_new_tokens=12, sampling=SAMPLING, stop_tokens=[7])
    on_gpu = generate(model.cuda(), PROMPTS, max_new_tokens=12, sampling=SAMPLING, stop_tokens=[7])
    assert [row.tokens for row in on_gpu.rows] == [row.tokens for row in on_cpu.rows]
    for cpu, gpu in zip(on_cpu.rows, on_gpu.rows, strict=True):
        assert gpu.logprobs == pytest.approx(cpu.logprobs, abs=1e-3)


def test_the_same_logits_draw_the_same_tokens_on_both_devices():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 50_432, generator=generator) * 3
    seen = torch.rand(64, 50_432, generator=generator) < 0.01
    drawn = [
        sample(logits.to(device), SAMPLING, seen_BV=seen.to(device), seeds=range(64), step=3).cpu()
        for device in ("cpu", "cuda")
    ]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precisions_agree_with_their_own_full_forward(dtype):
    """Cached and full forward round differently; most probable tokens must stay nearly as probable."""
    model = tiny_model(layer_pattern="FMA", kernels=KERNELS).cuda()
    for name, parameter in model.named_parameters():
        if not name.endswith(("A_log", "ssm.D", "dt_bias")):
            parameter.data = parameter.data.to(dtype)
    rows = generate(model, PROMPTS, max_new_tokens=12, sampling=SamplingConfig(greedy=True)).rows
    for prompt, row in zip(PROMPTS, rows, strict=True):
        text = torch.tensor([[*prompt, *row.tokens]], device="cuda")
        with torch.no_grad():
            logprobs = model(text).logits_BSV.float().log_softmax(-1)[0, len(prompt) - 1 : -1]
        again = logprobs.gather(1, text[0, len(prompt) :, None])[:, 0]
        assert again.cpu().tolist() == pytest.approx(row.logprobs, abs=0.3)
