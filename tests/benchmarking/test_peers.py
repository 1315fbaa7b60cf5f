"""What the benchmark makes of decoding, ours and the peer's, with CUDA graphs pretended on the CPU.

Shape legend: B rows, S tokens.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusiontree.benchmarking import peers
from tests.helpers import tiny_config, tiny_model
from tests.models.recording import pretend_gpu

TOKENS = 70


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)


def decode(model: Any) -> dict[str, Any]:
    ids_BS = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    return peers.decode_ours(model, ids_BS, torch.device("cpu"), tokens=TOKENS)


def test_our_decoding_is_timed_eagerly_and_by_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = pretend_gpu(monkeypatch)
    model = tiny_model(layer_pattern="FMA").bfloat16().eval()
    caches = []
    monkeypatch.setattr(model, "new_cache", lambda *a, f=model.new_cache, **k: caches.append(f(*a, **k)) or caches[-1])
    figures = decode(model)
    assert figures["steps"] == "cuda graph" and "error" not in figures
    assert figures["tokens_per_s"] > 0 and figures["eager_tokens_per_s"] > 0
    assert len(recorded) == len(caches) == 1
    assert caches[0].lengths == [peers.columns_to_decode(20, TOKENS)] * 2 == caches[0].positions_B.tolist()


def test_eager_figures_outlive_a_step_that_cannot_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)
    model = tiny_model(layer_pattern="FA").bfloat16().eval()
    # Reading a value on the host is what a capture refuses.
    model.norm.register_forward_hook(lambda module, inputs, output: output * bool(output.isfinite().all()))
    figures = decode(model)
    assert figures["steps"] == "eager" and figures["tokens_per_s"] > 0
    assert "cannot be recorded" in figures["error"]


def test_a_peer_without_a_cache_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its steps would see one token and nothing before it."""

    class Forgetful(torch.nn.Module):
        def forward(self, **_: Any) -> Any:
            return SimpleNamespace(logits=torch.zeros(1, 1, 64), past_key_values=None)

    monkeypatch.setattr(peers, "build_falcon", lambda *_: Forgetful())
    with pytest.raises(RuntimeError, match="no cache"):
        peers.decode_falcon(tiny_config(), torch.zeros(1, 8, dtype=torch.int64), torch.device("cpu"), tokens=2)
