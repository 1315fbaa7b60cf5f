"""A teacher beside the trained model, in one process; tests/parallel has the layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusiontree.engines.build import build_engine
from fusiontree.engines.teacher import build_teacher
from fusiontree.parallel.config import ParallelConfig
from fusiontree.parallel.layout import Layout
from fusiontree.training.config import TrainingConfig
from fusiontree.training.losses import LossWeights
from fusiontree.training.recorded_passes import build_passes
from fusiontree.utils.errors import UserError
from tests.engines.batches import micro_batch
from tests.helpers import tiny_config, tiny_model

TRAINING: dict[str, Any] = {"seq_len": 16, "max_steps": 3, "global_batch_size": 2, "precision": "fp32"}
POSITIONS_BS = torch.cat([torch.arange(5), torch.arange(11)]).expand(2, 16).contiguous()


def packed() -> Any:
    ids_BS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    return micro_batch(ids_BS, POSITIONS_BS)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_that_equals_its_teacher_does_not_diverge(precision: str) -> None:
    """Packed documents restart in the teacher, too; parameters that stay in fp32 do so in the teacher."""
    training = TrainingConfig.model_validate({**TRAINING, "precision": precision, "teacher_temperature": 2.0})
    parallel, config = ParallelConfig(engine="ddp"), tiny_config(layer_pattern="FMA")
    with Layout("cpu") as layout:
        engine: Any = build_engine(config, parallel, training, layout)
        teacher = build_teacher(config, parallel, training, layout)
        student = engine.state_tensors()
        for name, values in teacher.state_tensors().items():
            values.copy_(student[name])
        dtypes = {p.dtype for n, p in teacher.module.named_parameters() if "ssm" not in n and n != "norm.weight"}
        assert dtypes == {torch.float32 if precision == "fp32" else torch.bfloat16}
        assert teacher.module.layers[0].mamba.ssm.A_log.dtype == torch.float32  # type: ignore[union-attr]
        assert not any(parameter.requires_grad for parameter in teacher.module.parameters())
        engine.teacher = teacher
        output = engine.forward(packed())
        assert output.divergence_sum.abs() < (1e-4 if precision == "fp32" else 1e-2)
        assert not teacher.module.training
        output.divergence_sum.backward()


def test_another_teacher_diverges_and_evaluation_does_not_ask_it() -> None:
    training, parallel = TrainingConfig.model_validate(TRAINING), ParallelConfig(engine="ddp")
    with Layout("cpu") as layout:
        engine: Any = build_engine(tiny_config(), parallel, training, layout)
        other = tiny_model(seed=3, layer_pattern="MA", hidden_size=16, num_heads=2, gate_rank=4)
        engine.teacher = teacher = build_teacher(other.config, parallel, training, layout)
        parameters = dict(other.named_parameters())
        for name, values in teacher.state_tensors().items():
            values.copy_(parameters[name.removeprefix("model.")].detach())
        assert engine.forward(packed()).divergence_sum > 1.0
        called: list[Any] = []
        teacher.module.register_forward_hook(lambda *_: called.append(1))
        engine.evaluate(packed())
        assert not called


def test_steps_with_a_sharded_teacher_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    training = TrainingConfig.model_validate({**TRAINING, "cuda_graphs": "on"})
    parallel, config = ParallelConfig(engine="ddp"), tiny_config()
    with Layout("cpu") as layout:
        engine: Any = build_engine(config, parallel, training, layout)
        engine.teacher = build_teacher(config, parallel, training, layout)
        engine.teacher.is_sharded = True
        engine.device = torch.device("cuda")
        with pytest.raises(UserError, match="on, but the teacher's parameters are sharded"):
            build_passes(engine, config, training, LossWeights(0, 0, 0, 0.5, 0.1))
