"""Requests of lm-evaluation-harness on a GPU: the answers of the CPU."""

from __future__ import annotations

import pytest
import torch

from fusiontree.data.tokenizers import ByteTokenizer
from fusiontree.evaluation.responder import Responder
from tests.evaluation.test_responder import PAIRS
from tests.helpers import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("exact_products"),
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_are_those_of_the_cpu(side):
    # heads of 8 channels are too narrow for the fast kernels of attention
    model = tiny_model(vocab_size=264, layer_pattern="FMA", kernels={"attention": "sdpa"}).eval()
    texts = ["short", "long " * 30]
    requests = [(context, {"max_gen_toks": 12}) for context, _ in PAIRS]

    def answers() -> tuple[list, list, list]:
        responder = Responder(model, ByteTokenizer(), batch_size=4, padding_side=side)
        pairs = responder.loglikelihood(PAIRS)
        return pairs, responder.loglikelihood_rolling(texts), responder.generate_until(requests)

    pairs, totals, written = answers()
    model.cuda()
    pairs_on_gpu, totals_on_gpu, written_on_gpu = answers()
    assert [p.logprob for p in pairs_on_gpu] == pytest.approx([p.logprob for p in pairs], abs=1e-3)
    assert [p.is_greedy for p in pairs_on_gpu] == [p.is_greedy for p in pairs]
    assert totals_on_gpu == pytest.approx(totals, abs=1e-2)
    assert written_on_gpu == written
