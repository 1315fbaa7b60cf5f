"""What the loop keeps between launches: each small value of a checkpoint comes back, on parts that only take notes."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, call

import pytest
import torch

from fusiontree.training.loop import Position, Trainer
from tests.training.test_observers import finished


def new_trainer() -> Any:
    """A trainer without a run: every part takes notes."""
    trainer: Any = Trainer.__new__(Trainer)
    for name in ("engine", "records", "console", "spikes", "rewinds", "pipeline", "validation"):
        setattr(trainer, name, MagicMock())
    trainer.settings = SimpleNamespace(values={"model": {}}, training=SimpleNamespace(max_skipped_steps=3))
    trainer.position = Position()
    trainer.observers, trainer._train_seconds = [MagicMock()], 0.0
    trainer.engine.state_dict.return_value = {"optimizer_step": 4}
    trainer.spikes.state_dict.return_value = {"losses": [1.0]}
    trainer.rewinds.applied, trainer.rewinds.data_after.return_value = 2, None
    trainer.validation.last, trainer.pipeline.tokens = None, 0
    trainer.records.truncate_metrics.side_effect = lambda step: step
    return trainer


def saved(trainer: Any) -> dict[str, Any]:
    """The values as a checkpoint holds them."""
    return json.loads(json.dumps({"step": trainer.position.step, **trainer._state_dict()}))


def test_every_value_of_a_checkpoint_comes_back() -> None:
    before, after = new_trainer(), new_trainer()
    before.position = Position(5, {"row": 20}, skipped_in_a_row=2)
    before.pipeline.tokens = 640
    generator = torch.get_rng_state()
    state = saved(before)
    torch.rand(3)
    assert not torch.equal(torch.get_rng_state(), generator)
    after._load_state_dict(state)
    assert after.position == before.position
    assert after.pipeline.tokens == 640
    assert torch.equal(torch.get_rng_state(), generator)
    assert after.engine.load_state_dict.mock_calls == [call({"optimizer_step": 4})]
    assert after.spikes.load_state_dict.mock_calls == [call({"losses": [1.0]})]
    assert after.rewinds.restore.mock_calls == [call(2)]
    assert after.rewinds.data_after.mock_calls == [call(5)]
    assert after.records.truncate_metrics.mock_calls == [call(5)]


def test_a_rewind_to_the_loaded_step_decides_where_the_data_goes_on() -> None:
    trainer = new_trainer()
    state = saved(new_trainer()) | {"step": 5, "data": {"row": 20}}
    trainer.rewinds.data_after.return_value = {"row": 60}
    trainer._load_state_dict(state)
    assert trainer.position == Position(5, {"row": 60})


@pytest.mark.parametrize(("validated_at", "expected"), [(5, 2.5), (4, None), (None, None)])
def test_a_checkpoint_bears_the_validation_loss_of_its_own_step(validated_at: int | None, expected: Any) -> None:
    trainer = new_trainer()
    trainer.position = Position(5)
    trainer.validation.last = None if validated_at is None else (validated_at, 2.5)
    assert trainer._state_dict().get("validation_loss") == expected


def test_an_applied_step_ends_a_row_of_skips() -> None:
    trainer = new_trainer()
    skipped = finished(1, skipped="overflow")
    skipped.is_spike = False
    for step in (skipped, skipped, finished(2), skipped):
        trainer._process(step)
    assert trainer.position.skipped_in_a_row == 1
    assert [recorded.args[0] for recorded in trainer.records.event.mock_calls] == ["step_skipped"] * 3
    assert len(trainer.observers[0].after_step.mock_calls) == 4
