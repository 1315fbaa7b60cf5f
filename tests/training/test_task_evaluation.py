"""Tasks between training steps: the numbers of the offline evaluation, and training as without them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from fusiontree.evaluate import main as evaluate
from fusiontree.evaluation.in_training import measures
from fusiontree.tracking.records import read_records
from fusiontree.training import task_evaluation
from fusiontree.training.task_evaluation import EngineScorer, TaskEvaluation
from tests.end_to_end.runs import CONFIG, metrics
from tests.engines.batches import micro_batch
from tests.parallel.launch import Table
from tests.parallel.table import MODEL, RECORDED, Cell
from tests.tiny import changed
from tests.training.test_observers import finished

pytestmark = [pytest.mark.xdist_group("task evaluation"), pytest.mark.timeout(600)]

TASKS = ["perplexity", "needle", "copy", "recall"]
SECTIONS: dict[str, Any] = {
    # Large matrices, so that a state or a token that is lost shows in every score.
    "model": changed(MODEL, num_layers=2, layer_pattern="FM", initializer_range=0.2),
    "training": {**CONFIG["training"], "max_steps": 4, "validation": {"interval": 3, "rows": 3}},
    "checkpoint": {"save_interval": 4},
    "evaluation": {
        "training_tasks": TASKS,
        "rows": 3,
        "max_rows": 5,
        "lengths": [33],
        "depths": [0.0, 0.6],
        "needle_tokens": 2,
        "recall_pairs": 3,
    },
}
FAST = [Cell("fsdp2", 1, 2, 1)]
SLOW = {
    "dp 2": [
        *(Cell(engine, 2) for engine in ("ddp", "fsdp2", "zero1", "zero2", "zero3")),
        Cell("ddp", 2, extra=RECORDED),
    ],
    "cp 2": [Cell(engine, cp=2) for engine in ("ddp", "zero1", "zero3")],
    "tp 2": [Cell(engine, tp=2) for engine in ("ddp", "fsdp2", "zero1", "zero3")],
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return Table(tmp_path_factory.mktemp("task_evaluation"), SECTIONS)


def offline(folder: Path, output: Path) -> dict[str, float]:
    """The measures of a checkpoint by the command, under their names in metrics.jsonl."""
    arguments = ["--checkpoint", str(folder), "--tasks", *TASKS, "--output", str(output)]
    assert evaluate([*arguments, "--device", "cpu", "--dtype", "float32"]) == 0
    results = json.loads(output.read_text())["results"]
    return {f"evaluation/{task}/{name}": v for task in TASKS for name, v in measures(results[task]).items()}


def check(table: Table, cells: list[Cell]) -> None:
    """Train every cell with and without evaluations; compare losses, and measures with those of the checkpoints."""
    on = ["evaluation.interval=2"]
    jobs: list[Any] = []
    for cell in cells:
        jobs += [(str(table.folder / f"{cell.name}-{n}"), [*cell.overrides(), *on[:n]], None) for n in (0, 1)]
    table.train(2, jobs)
    for cell in cells:
        without, run = (table.folder / f"{cell.name}-{n}" for n in (0, 1))
        for key in ("loss", "grad_norm", "validation_loss"):
            assert metrics(run, key) == metrics(without, key), f"{cell.name} {key}"
        evaluated = [record for record in read_records(run / "metrics.jsonl") if "evaluation_s" in record]
        assert [record["step"] for record in evaluated] == [2, 4]
        found = {name: value for name, value in evaluated[-1].items() if name.startswith("evaluation/")}
        wanted = offline(run / "checkpoints" / "step-00000004", table.folder / "out.json")
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-7), cell.name


def test_measures_are_the_offline_ones_and_training_does_not_change(table: Table) -> None:
    check(table, FAST)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("cells", SLOW.values(), ids=list(SLOW))
def test_the_same_under_every_engine_and_layout(table: Table, cells: list[Cell]) -> None:
    check(table, cells)


@pytest.mark.slow
def test_a_resumed_run_evaluates_as_an_uninterrupted_one(table: Table) -> None:
    on = [*Cell("ddp").overrides(), "evaluation.interval=2", "evaluation.training_tasks=[copy, needle]"]
    runs = [str(table.folder / name) for name in ("whole", "parted")]
    table.train(1, [(runs[0], on, None), (runs[1], [*on, "training.exit_at_step=3"], None), (runs[1], on, None)])
    whole, parted = (read_records(Path(run) / "metrics.jsonl") for run in runs)
    for key in ("loss", "evaluation/copy/token_accuracy", "evaluation/needle/nats_per_token/depth_0.6"):
        values = [record[key] for record in whole if key in record]
        assert len(values) == (4 if key == "loss" else 2)
        assert [record[key] for record in parted if key in record] == values


def test_every_shape_is_warmed_up_once_outside_the_measured_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, passes = [0.0], []
    monkeypatch.setattr(task_evaluation.time, "perf_counter", lambda: clock[0])

    def score(micro: Any, never_M: torch.Tensor) -> str:
        passes.append((micro.input_ids_BS.shape, never_M.tolist()))
        clock[0] += 10.0 if len(passes) in (1, 4) else 1.0
        return f"pass {len(passes)}"

    engine = SimpleNamespace(score=score, dp_rank=1, dp_size=2)
    scorer = EngineScorer(engine, [7], MagicMock(), 0.0)
    short, long = (micro_batch(torch.zeros(1, length, dtype=torch.int64)) for length in (4, 8))
    assert [scorer.score(short), scorer.score(short), scorer.score(long)] == ["pass 2", "pass 3", "pass 5"]
    assert scorer.warm_up_s == 20.0
    assert passes[0] == ((1, 4), [7])
    assert (scorer.dp_rank, scorer.dp_size) == (1, 2)


def observer(seconds: float, monkeypatch: pytest.MonkeyPatch) -> tuple[TaskEvaluation, MagicMock]:
    """An observer of evaluations every 10 steps that take ``seconds``, 1 s of them to warm up."""
    clock, parts = [0.0], MagicMock()
    monkeypatch.setattr(task_evaluation.time, "perf_counter", lambda: clock[0])

    def run_tasks() -> dict[str, dict[str, float]]:
        clock[0] += seconds
        parts.scorer.warm_up_s += 1.0
        return {"copy": {"token_accuracy": 0.5, "nats_per_token": 2.0}}

    config = SimpleNamespace(evaluation=SimpleNamespace(interval=10))
    settings: Any = SimpleNamespace(
        config=config, training=SimpleNamespace(max_steps=25), limits=SimpleNamespace(slow_s=9.0)
    )
    return TaskEvaluation(settings, parts.records, parts.watchdog, parts.console, parts.scorer, run_tasks), parts


def test_measures_and_their_cost_are_recorded_where_due(monkeypatch: pytest.MonkeyPatch) -> None:
    task, parts = observer(1.01, monkeypatch)
    assert [step for step in range(1, 26) if task.needs_finished_step(step)] == [10, 20, 25]
    for step in range(1, 26):
        task.after_step(finished(step))
    (first, *others) = [recorded.args[0] for recorded in parts.records.metrics.mock_calls]
    assert [record["step"] for record in others] == [20, 25]
    assert first.pop("evaluation_s") == pytest.approx(0.01)
    assert first.pop("evaluation_share") == pytest.approx(0.01 / (10 * 0.2))  # finished() steps take 0.2 s
    measures = {"evaluation/copy/token_accuracy": 0.5, "evaluation/copy/nats_per_token": 2.0}
    assert first == {"step": 10, "tokens": 80, **measures}
    assert not parts.records.event.mock_calls


def test_expensive_evaluations_are_announced_once_with_an_interval_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    task, parts = observer(1.1, monkeypatch)
    for step in (10, 20):
        task.after_step(finished(step))
    (event,) = parts.records.event.mock_calls
    assert event.args == ("evaluation_expensive",)
    assert "5.0% of the step time at evaluation.interval 10; from 51 on" in event.kwargs["reason"]
