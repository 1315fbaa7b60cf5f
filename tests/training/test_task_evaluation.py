"""Tasks between training steps: the numbers of the offline evaluation, and training as without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusiontree.evaluate import main as evaluate
from fusiontree.evaluation.in_training import measures
from fusiontree.tracking.records import read_records
from tests.end_to_end.runs import CONFIG, metrics
from tests.parallel.launch import Table
from tests.parallel.table import RECORDED, Cell
from tests.tiny import changed

pytestmark = [pytest.mark.xdist_group("task evaluation"), pytest.mark.timeout(600)]

TASKS = ["perplexity", "needle", "copy", "recall"]
SECTIONS: dict[str, Any] = {
    # Large matrices, so that a state or a token that is lost shows in every score.
    "model": changed(CONFIG["model"], num_heads=8, num_kv_heads=4, head_dim=8, initializer_range=0.2),
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
SLOW = [
    *(Cell(engine, *axis) for engine in ("ddp", "zero1", "zero3") for axis in ((2,), (1, 2), (1, 1, 2))),
    *(Cell("fsdp2", 2), Cell("fsdp2", tp=2), Cell("zero2", 2)),
    Cell("ddp", 2, extra=RECORDED),
]


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
def test_the_same_under_every_engine_and_layout(table: Table) -> None:
    check(table, SLOW)
