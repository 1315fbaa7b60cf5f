from __future__ import annotations

import pytest

from fusiontree.training.config import TrainingConfig
from fusiontree.training.schedule import learning_rate


def config(**values: object) -> TrainingConfig:
    base = {"seq_len": 8, "max_steps": 100, "global_batch_size": 1, "learning_rate": 1.0, "min_lr_ratio": 0.1}
    return TrainingConfig(**(base | {"warmup_steps": 10} | values))


def test_warmup_is_linear_to_the_peak() -> None:
    assert [learning_rate(s, config()) for s in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])


@pytest.mark.parametrize(
    ("scheduler", "middle", "end"), [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)]
)
def test_shapes(scheduler: str, middle: float, end: float) -> None:
    assert learning_rate(55, config(lr_scheduler=scheduler)) == pytest.approx(middle)
    assert learning_rate(100, config(lr_scheduler=scheduler)) == pytest.approx(end)


def test_wsd_is_flat_then_falls() -> None:
    c = config(lr_scheduler="wsd", decay_steps=20)
    assert [learning_rate(s, c) for s in (11, 80, 90, 100)] == pytest.approx([1.0, 1.0, 0.55, 0.1])


def test_no_warmup_starts_at_the_peak() -> None:
    assert learning_rate(1, config(warmup_steps=0, lr_scheduler="constant")) == 1.0
