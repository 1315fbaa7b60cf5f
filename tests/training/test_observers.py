"""The observers of a run: who is told which event, and when the pipeline must be drained."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, call

import pytest

from fusiontree.supervision.config import SupervisionConfig
from fusiontree.training import observers
from fusiontree.training.loop import Position, Trainer
from fusiontree.training.observers import HealthMonitor, Observer, PeerWatch, StepLog


def finished(number: int, skipped: str | None = None) -> Any:
    """A finished step."""
    return SimpleNamespace(
        number=number,
        skipped=skipped,
        tokens=8 * number,
        token_sums=SimpleNamespace(lm=2.5, z=0.0, divergence=0.0),
        row_sums=SimpleNamespace(load_balance=0.0, entropy=0.0),
        batch=SimpleNamespace(epochs=(0.5,), wait_s=0.0),
        device_s=0.2,
        own_s=0.1,
        host_s=0.2,
    )


def run_settings(**supervision: Any) -> Any:
    config = SimpleNamespace(supervision=SupervisionConfig(**supervision), logging="logging section")
    limits = SimpleNamespace(slow_s=9.0)
    return SimpleNamespace(config=config, limits=limits, run_dir="run", values={}, is_logged=lambda step: step % 2 == 0)


def test_step_log_shows_every_step_and_records_logged_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observers, "step_metrics", lambda step, *_: {"step": step.number})
    parts = MagicMock()
    log = StepLog(parts.engine, run_settings(), parts.records, parts.watchdog, parts.console)
    log.on_start(3)
    assert parts.mock_calls == [call.records.open_trackers("logging section", "run", {}, 3), call.console.start(3)]
    parts.reset_mock()
    log.after_step(finished(4))
    log.after_step(finished(5, skipped="loss spike"))
    assert parts.records.mock_calls == [call.metrics({"step": 4})]
    assert parts.console.mock_calls == [
        call.after_step(4, 2.5, 32, [0.5]),
        call.logged({"step": 4}),
        call.after_step(5, None, 40, [0.5]),
    ]


def test_logged_losses_and_times_are_means_since_the_last_logged_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, tuple[float, ...]]] = []
    parts = MagicMock()
    log = StepLog(parts.engine, run_settings(), parts.records, parts.watchdog, parts.console)
    monkeypatch.setattr(observers, "step_metrics", lambda *args: seen.append((len(args[-1]), args[-1].means())) or {})
    for number, lm in ((1, 2.0), (2, 4.0), (3, float("nan")), (4, 5.0), (6, float("inf"))):
        step = finished(number)
        step.token_sums.lm, step.device_s, step.batch.wait_s = lm, 0.5 * number, 0.25
        log.after_step(step)
    assert [(count, means[0], means[5], means[6]) for count, means in seen[:2]] == [
        (2, 3.0, 0.75, 0.25),
        (2, 5.0, 1.75, 0.25),
    ]
    assert seen[2][0] == 1
    assert math.isnan(seen[2][1][0])
    log.after_step(finished(7))
    log.on_rewind(5)
    log.after_step(finished(6))
    assert seen[3][0] == 1  # what was computed before the rewind is not part of it


def test_step_log_sets_the_progress_back_when_it_is_told_of_a_rewind() -> None:
    parts = MagicMock()
    log = StepLog(parts.engine, run_settings(), parts.records, parts.watchdog, parts.console)
    log.on_rewind(6)
    assert parts.mock_calls == [call.console.start(6)]


@pytest.mark.parametrize(("outcome", "patience_s"), [("finished", 60), ("failed", 10)])
def test_step_log_writes_the_end_before_it_closes(outcome: str, patience_s: int) -> None:
    parts = MagicMock()
    log = StepLog(parts.engine, run_settings(), parts.records, parts.watchdog, parts.console)
    log.on_end(9, outcome, "because")
    assert parts.mock_calls == [
        call.records.event(outcome, step=9, reason="because"),
        call.records.close(patience_s=patience_s),
        call.console.close(),
    ]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_pipeline_is_drained_where_copies_or_ranks_are_compared(ranks: int) -> None:
    parts = MagicMock()
    parts.engine.world_size = ranks
    settings = run_settings(straggler_interval=4, replica_check_interval=6)
    monitor = HealthMonitor(parts.engine, settings, parts.records, parts.watchdog)
    assert [step for step in range(1, 13) if monitor.needs_finished_step(step)] == ([4, 6, 8, 12] if ranks > 1 else [])
    assert not Observer().needs_finished_step(4)


def test_peer_watch_gives_the_watchdog_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = MagicMock()
    monkeypatch.setattr(observers, "Peers", peers)
    parts = MagicMock()
    PeerWatch(parts.engine, parts.watchdog).on_start(0)
    peers.assert_called_once_with(parts.engine.gather_text.return_value)
    assert parts.watchdog.silent_hosts is peers.return_value.silent


def test_a_rewind_loads_the_checkpoint_then_tells_all_observers() -> None:
    parts = MagicMock()
    trainer: Any = Trainer.__new__(Trainer)
    for name in ("batches", "watchdog", "checkpoints", "pipeline", "rewinds", "engine", "records", "console"):
        setattr(trainer, name, getattr(parts, name))
    trainer.observers, trainer._section_timeout_s = [parts.first, parts.second], 0.0
    trainer._load_state_dict = parts.load

    def load(state: dict[str, Any]) -> None:
        trainer.position = Position(state["step"], {"row": 1})

    parts.load.side_effect = load
    parts.batches.position = {"row": 40}
    parts.checkpoints.load_newest.return_value = ("folder", {"step": 6})
    assert trainer._rewind(9, "loss spike")
    names = [name for name, *_ in parts.mock_calls]
    wanted = ["checkpoints.wait", "pipeline.forget", "load", "batches.seek", "first.on_rewind", "second.on_rewind"]
    assert [name for name in names if name in wanted] == wanted
    assert parts.first.mock_calls == parts.second.mock_calls == [call.on_rewind(6)]
    parts.checkpoints.load_newest.return_value = None
    parts.reset_mock()
    assert not trainer._rewind(9, "loss spike")
    assert not parts.first.mock_calls
