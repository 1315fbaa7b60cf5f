"""A parameter that nothing uses gets no gradient; every engine applies its weight decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusiontree.engines import build, torch_engine
from fusiontree.parallel.config import ParallelConfig
from fusiontree.parallel.layout import Layout
from fusiontree.training.config import TrainingConfig
from tests.engines.batches import micro_batch
from tests.engines.test_local import whole
from tests.helpers import tiny_config

STEPS, RATE, DECAY = 3, 1e-2, 0.5


@pytest.mark.xdist_group("zero")
@pytest.mark.parametrize(
    ("engine_name", "shared"),
    [("ddp", False), ("ddp", True), ("fsdp2", True), ("zero1", True), ("zero2", True), ("zero3", True)],
)
def test_weight_decay_without_a_gradient(engine_name: Any, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention alone does not read the time encoding, so that its table has no gradient."""
    values = {"seq_len": 16, "max_steps": STEPS, "global_batch_size": 1, "micro_batch_size": 1, "weight_decay": DECAY}
    model = tiny_config(layer_pattern="AA", srte_encoding="learnable")
    monkeypatch.setattr(torch_engine, "is_local", lambda mesh: not shared)
    with Layout("cpu") as layout:
        training = TrainingConfig.model_validate(values)
        engine: Any = build.build_engine(model, ParallelConfig(engine=engine_name), training, layout)
        before = whole(engine.state_tensors()["model.srte.weight"]).clone()
        for _ in range(STEPS):
            engine.backward(engine.forward(micro_batch(torch.arange(16)[None])).loss_sum / 16, last=True)
            engine.step(RATE)
        after = whole(engine.state_tensors()["model.srte.weight"])
        assert engine.state_dict()["optimizer_step"] == STEPS
    torch.testing.assert_close(after, before * (1 - RATE * DECAY) ** STEPS, rtol=1e-6, atol=1e-9)
    assert before.norm() > 0
