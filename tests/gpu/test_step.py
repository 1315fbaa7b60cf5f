"""On a GPU: the host queues a training step without ever waiting for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fusiontree.config.load import load_config
from fusiontree.train import train
from fusiontree.training.pipeline import StepPipeline
from tests.end_to_end.runs import build_data, metrics, write_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_no_operation_of_a_step_waits_for_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    original = StepPipeline.submit

    def submit(self: StepPipeline, step: int, **named: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")  # kernels are compiled before
        try:
            return original(self, step, **named)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(StepPipeline, "submit", submit)
    config = write_config(tmp_path, build_data(tmp_path))
    sizes = "model.hidden_size=256 model.mamba.head_dim=64 model.mamba.d_state=64 model.mamba.chunk_size=64"
    lengths = "training.seq_len=256 model.max_position_embeddings=256 model.window_size=64 training.max_steps=6"
    settings = ["training.device=cuda", f"training.precision={precision}", *sizes.split(), *lengths.split()]
    assert train(load_config(str(config), settings)) == 0
    assert len(metrics(tmp_path / "run")) == 6
