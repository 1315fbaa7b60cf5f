"""What a teacher adds to the planner's estimate, by engine and layout."""

from __future__ import annotations

import pytest

from fusiontree.config.load import load_config
from fusiontree.models.config import ModelConfig
from fusiontree.planning.cost_model import Estimate, Hardware, count_parameters, estimate

BATCH = "training.global_batch_size=32"


@pytest.fixture(scope="module")
def teacher() -> ModelConfig:
    return load_config("bench/hybrid_400m_8k").model


def both(teacher: ModelConfig, gpus: int, *overrides: str, memory_gib: float = 80) -> tuple[Estimate, Estimate]:
    """Estimate a small model without and with the teacher."""
    config = load_config("bench/hybrid_50m_8k", [BATCH, *overrides])
    given = (config.model, config.parallel, config.training, gpus, Hardware(memory_gib))
    return estimate(*given), estimate(*given, teacher)


@pytest.mark.parametrize(("engine", "copies"), [("ddp", 1), ("zero2", 1), ("fsdp2", 8), ("zero3", 8)])
def test_engines_that_shard_parameters_shard_the_teacher(engine: str, copies: int, teacher: ModelConfig) -> None:
    alone, taught = both(teacher, 8, f"parallel.engine={engine}")
    assert (alone.teacher_gib, alone.teacher_s) == (0.0, 0.0)
    held = 2 * sum(count_parameters(teacher, tp=1)[:2]) / copies / 2**30
    assert held < taught.teacher_gib < held + 0.3  # blocks at work, hidden states
    assert taught.total_gib == pytest.approx(alone.total_gib + taught.teacher_gib, rel=1e-6)
    assert taught.compute_s == pytest.approx(alone.compute_s + taught.teacher_s, rel=1e-6)
    assert (taught.communication_s > alone.communication_s) == (copies > 1)


def test_a_teacher_takes_a_forward_pass(teacher: ModelConfig) -> None:
    """The teacher has 7.6 times the parameters, and its forward pass is a third of its training."""
    alone, taught = both(teacher, 1)
    assert 2 < taught.step_s / alone.step_s < 1 + 7.6 / 3
    for axis in ("tp", "cp"):
        alone, split = both(teacher, 8, "parallel.engine=ddp", f"parallel.{axis}=2")
        assert split.communication_s > 1.01 * alone.communication_s
        whole = both(teacher, 4, "parallel.engine=ddp")[1]  # as many rows per pass, on half of the ranks
        assert split.teacher_s == pytest.approx(whole.teacher_s / 2, rel=0.01)


def test_auto_recomputes_more_beside_a_teacher(teacher: ModelConfig) -> None:
    memory_gib = both(teacher, 1)[0].total_gib / 0.9
    alone, taught = both(teacher, 1, "training.activation_checkpointing=auto", memory_gib=memory_gib)
    assert alone.recompute == "none in 8 layers" != taught.recompute and taught.fits
