"""``fusiontree benchmark-decoding`` on the CPU, which pretends to be a GPU; the bound that its figures stand beside."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from fusiontree.benchmarking import decoding
from fusiontree.cli import benchmark_decoding
from fusiontree.models.fused_step import prepare
from tests.helpers import tiny_config, tiny_model
from tests.models.recording import pretend_gpu


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("transformers"):
        import_module("transformers.generation.utils")  # its annotations need torch.cuda's own classes
    pretend_gpu(monkeypatch)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(benchmark_decoding, "gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(decoding, "bandwidth", lambda device: 1e6)


def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, list[dict[str, Any]], str]:
    settings = tiny_config(layer_pattern="FA").model_dump(mode="json", exclude_defaults=True)
    training = {"seq_len": 32, "max_steps": 10, "global_batch_size": 1, "micro_batch_size": 1, "precision": "fp32"}
    tokens = {"path": "synthetic", "type": "synthetic", "weight": 1, "options": {"vocab_size": 64}}
    sections = {"model": settings, "training": training, "data": {"train": [tokens]}}
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "run"), **sections}))
    sizes = ("--context", "20", "--tokens", "3", "--prefill", "24", "--prefill-chunk", "8")
    code = benchmark_decoding.main(["--config", str(file), *sizes, *options])
    out, err = capsys.readouterr()
    assert code in (0, 1), err
    return code, json.loads(out.splitlines()[-1])["figures"], out


def test_every_part_is_a_line_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ("bf16", "int8", "fp8")
    code, figures, out = run(tmp_path, capsys, "--rows", "2", "--weights", *kinds)
    assert code == 0, [part["error"] for part in figures if "error" in part]
    decoded = [(part["weights"], part["steps"], part["rows"]) for part in figures if "steps" in part]
    assert decoded == [(kind, steps, 2) for kind in kinds for steps in ("fused", "forward")]
    assert [part["weights"] for part in figures if "activations_gib" in part] == list(kinds)
    needed = {part["weights"]: part["bytes"] for part in figures if "rows" in part}
    assert needed["int8"] == needed["fp8"] < needed["bf16"]
    assert all(part["tokens_per_s"] > 0 for part in figures) and out.count(" failed") == 0
    assert len(out.splitlines()) == 3 + len(figures)


def test_our_export_is_timed_through_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    options = ("--rows", "1", "--steps", "fused", "--prefill", "0", "--peers", "export")
    code, figures, _ = run(tmp_path, capsys, *options)
    assert code == 0, figures[-1]
    assert figures[-1]["measured"].startswith("export") and figures[-1]["tokens_per_s"] > 0
    monkeypatch.setattr("fusiontree.convert.hf._MIXERS", ("mamba2",))
    code, figures, _ = run(tmp_path, capsys, "model.branch_norm=true", *options)
    assert code == 1 and "has no mixers" in figures[-1]["error"] and figures[0]["tokens_per_s"] > 0


def test_a_part_that_fails_does_not_lose_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    def absent(*_: Any, **__: Any) -> None:
        raise ImportError("no package")

    monkeypatch.setattr(decoding, "prefill_rate", full)
    monkeypatch.setattr("fusiontree.benchmarking.peers.decode_falcon", absent)
    monkeypatch.setattr("fusiontree.benchmarking.peers.falcon_missing", lambda: "")
    code, figures, out = run(tmp_path, capsys, "--rows", "1", "--steps", "fused", "--peers", "falcon")
    assert code == 1 and [part.get("error", "") for part in figures] == [
        *("", "OutOfMemoryError: no room", "ImportError: no package")
    ]
    assert figures[0]["tokens_per_s"] > 0 and out.count("failed") == 2


def test_the_peers_prefill_is_cut_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusiontree.benchmarking import peers

    seen: list[int] = []

    class Peer(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, past_key_values: Any, **_: Any) -> Any:
            seen.append(input_ids.shape[1])
            if input_ids.shape[1] > 3:
                raise torch.OutOfMemoryError
            return SimpleNamespace(logits=torch.zeros(1, 1, 64), past_key_values=(past_key_values or 0) + 1)

    monkeypatch.setattr(peers, "build_falcon", lambda *_: Peer())
    monkeypatch.setattr(peers, "_PEER_CHUNK", 3)
    ids_BS = torch.zeros(1, 8, dtype=torch.int64)
    peers.decode_falcon(tiny_config(), ids_BS, torch.device("cpu"), tokens=2)
    assert seen[:4] == [8, 3, 3, 2] and set(seen[4:]) == {1}


def test_the_bound_counts_what_a_step_must_read() -> None:
    model = tiny_model(layer_pattern="FA", window_size=5).eval()
    prepare(model)
    weights = 4 * sum(p.numel() for p in model.parameters()) - 4 * model.embed.weight.numel()
    with torch.inference_mode():
        ids = torch.randint(0, 64, (1, 20), generator=torch.Generator().manual_seed(0))
        one, three = (decoding.decoded_rates(model, ids, rows, 7, prefill_chunk=8) for rows in (1, 3))
    config, steps = model.config, 20 + 7 + decoding.WARMUP_STEPS
    head = 2 * 4 * config.attention_head_dim  # key and value in fp32
    attention = config.num_layers * head * (config.local_kv_heads * 5 + config.global_kv_heads * steps)
    mamba, inner = config.mamba, config.d_inner
    taps = (mamba.d_conv - 1) * (inner + 2 * mamba.n_groups * mamba.d_state)
    state = 2 * 4 * (taps + inner * mamba.d_state)  # one layer with Mamba; read and written
    assert one["bytes"] == pytest.approx(weights + attention + state, rel=1e-3)
    assert three["bytes"] - one["bytes"] == pytest.approx(2 * (attention + state), rel=1e-3)
    assert three["bound"] == pytest.approx(3e6 / three["bytes"])
    assert one["share"] == pytest.approx(one["tokens_per_s"] / one["bound"])
