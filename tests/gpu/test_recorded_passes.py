"""On a GPU: recorded passes give the losses and gradient norms of eager passes, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fusiontree.config.load import load_config
from fusiontree.train import train
from fusiontree.training import recorded_passes
from tests.end_to_end.runs import build_data, metrics, write_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SIZES = [
    "model.hidden_size=256",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.global_heads=2",
    "model.mamba={head_dim: 64, d_state: 64, chunk_size: 64}",
    "model.window_size=128",
    "model.kernels.attention=flex",  # its backward pass adds in a fixed order, those of the packages do not
    "model.max_position_embeddings=512",
    "training.seq_len=512",
]
STEPS = 50
CASES = {
    "plain": [],
    "accumulation": ["training.global_batch_size=16", "training.micro_batch_size=2"],
    "two micro-batches, full recomputation": [
        "training.global_batch_size=8", "training.micro_batch_size=4", "training.activation_checkpointing=full",
    ],
    "selective recomputation": ["training.activation_checkpointing=selective"],
    "curriculum": ["training.curriculum=[[128,10],[256,10]]"],
    "branch dropout": ["model.drop_branch_prob=0.2"],
    "spikes": ["training.spikes.policy=skip", "training.spikes.window=8", "training.spikes.threshold=1.0"],
    "fp16": ["training.precision=fp16"],
    "fp32": ["training.precision=fp32"],
    "fp8": ["training.matmul_precision=fp8"],
    "fp8, casts kept for several micro-batches": [
        "training.matmul_precision=fp8", "training.fp8.scaling=row", "training.global_batch_size=16",
        "training.micro_batch_size=2",
    ],
}  # fmt: skip


def run(tmp_path: Path, name: str, settings: list[str], data: Path, steps: int = STEPS) -> Path:
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    config = write_config(folder, data)
    common = ["training.device=cuda", f"training.max_steps={steps}", "checkpoint.save_interval=20", *SIZES]
    assert train(load_config(str(config), [*common, "training.precision=bf16", *settings])) in (0, 75)  # 75: to go on
    return folder / "run"


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let a failed recording fail the test, and note the recorded kinds of passes."""
    seen: list[str] = []
    original = recorded_passes.RecordedPasses._record

    def _record(self: Any, key: Any, *others: Any) -> bool:
        done = original(self, key, *others)
        assert done, self.problem
        seen.append(str(key))
        return done

    monkeypatch.setattr(recorded_passes.RecordedPasses, "_record", _record)
    return seen


@pytest.mark.parametrize("case", list(CASES))
def test_losses_and_norms_are_those_of_eager_passes(tmp_path: Path, case: str, recorded: list[str]) -> None:
    """``on`` also records the branches of a block side by side."""
    data = build_data(tmp_path)
    run(tmp_path, "warm-up", [*CASES[case], "training.cuda_graphs=off"], data, 20)  # compiles kernels for all shapes
    found = {}
    for graphs in ("off", "auto", "on"):
        folder = run(tmp_path, graphs, [*CASES[case], f"training.cuda_graphs={graphs}"], data)
        found[graphs] = [metrics(folder, key) for key in ("loss", "grad_norm")]
    assert recorded
    assert found["auto"] == found["off"]
    assert found["on"] == found["off"]


def test_a_run_goes_on_from_a_checkpoint_between_recorded_steps(tmp_path: Path, recorded: list[str]) -> None:
    data = build_data(tmp_path)
    run(tmp_path, "warm-up", ["training.cuda_graphs=off"], data, 20)
    expected = metrics(run(tmp_path, "whole", ["training.cuda_graphs=off"], data), "loss")
    run(tmp_path, "parts", ["training.exit_at_step=25"], data)
    assert metrics(run(tmp_path, "parts", [], data), "loss") == expected
    assert recorded


def test_steps_with_a_teacher_are_those_of_eager_passes(tmp_path: Path, recorded: list[str]) -> None:
    data = build_data(tmp_path)
    source = run(tmp_path, "source", ["training.cuda_graphs=off"], data, 20)
    taught = [f"training.teacher={source}", "training.seed=1", "training.teacher_temperature=2.0"]
    run(tmp_path, "warm-up", [*taught, "training.cuda_graphs=off"], data, 20)
    runs = [
        run(tmp_path, graphs, [*taught, f"training.cuda_graphs={graphs}"], data) for graphs in ("off", "auto", "on")
    ]
    for key in ("loss", "grad_norm", "distillation_loss"):
        assert metrics(runs[1], key) == metrics(runs[0], key) == metrics(runs[2], key)
    assert recorded


def test_tasks_between_recorded_steps_change_no_step(tmp_path: Path, recorded: list[str]) -> None:
    """Their rows have other lengths than training's, and every second step has an evaluation behind it."""
    data = build_data(tmp_path)
    tasks = ["evaluation.interval=2", "evaluation.lengths=[100, 512]", "evaluation.rows=3", "evaluation.depths=[0.5]"]
    run(tmp_path, "warm-up", ["training.cuda_graphs=off"], data, 20)
    runs = [run(tmp_path, name, more, data) for name, more in (("without", []), ("with", tasks))]
    for key in ("loss", "grad_norm"):
        assert metrics(runs[1], key) == metrics(runs[0], key)
    assert len(metrics(runs[1], "evaluation/copy/token_accuracy")) == STEPS // 2
    assert recorded
