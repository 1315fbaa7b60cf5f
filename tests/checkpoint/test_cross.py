"""The cross table: any layout loads the checkpoint of any other bit by bit and continues with the same losses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from fusiontree.checkpoint.reader import CheckpointReader
from tests.end_to_end.runs import metrics
from tests.parallel.launch import Job, Table
from tests.parallel.table import MODEL, PRUNED, TRAINING, Cell

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cross"), pytest.mark.timeout(7200)]

SAVED, STEPS = 5, 15
TOLERANCE = 1e-6


SAVING = [
    Cell("fsdp2", 4),
    Cell("fsdp2", 2, tp=2),
    Cell("fsdp2", cp=2, tp=2),
    Cell("fsdp2", 4, extra=("parallel.shard_size=2",)),
    Cell("zero3", 4),
    Cell("zero3", 2, cp=2),
    Cell("zero3", 2, tp=2),
    Cell("zero2", 4),
    Cell("ddp", 4),
    Cell("fsdp2"),
]
LOADING = [*SAVING, Cell("fsdp2", 2), Cell("zero3", 2), Cell("ddp", tp=2)]


class CrossTable(Table):
    """Runs layouts that save, and layouts that load what they saved."""

    def __init__(self, folder: Path) -> None:
        sections = {"model": MODEL, "training": TRAINING | {"max_steps": STEPS, "validation": {}}}
        sections["checkpoint"] = {"save_interval": SAVED, "keep_last": 0}
        super().__init__(folder, sections, worker="tests.checkpoint.cross_worker")

    def saved(self, cell: Cell) -> Path:
        """Run folder of the layout that saves."""
        return self.folder / "saved" / cell.name

    def loaded(self, cell: Cell, by: Cell) -> Path:
        """Run folder of ``by``, started from what ``cell`` saved."""
        return self.folder / "loaded" / f"{cell.name}-by-{by.name}"

    def checkpoint(self, cell: Cell) -> Path:
        """Checkpoint that ``cell`` saved."""
        return self.saved(cell) / "checkpoints" / f"step-{SAVED:08d}"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> CrossTable:
    return CrossTable(tmp_path_factory.mktemp("cross"))


def prepare(table: CrossTable, cell: Cell, by: Cell) -> Job:
    """Make a run folder that holds nothing but what ``cell`` saved."""
    run = table.loaded(cell, by)
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(table.saved(cell) / "config.yaml", run / "config.yaml")
    shutil.copytree(table.checkpoint(cell), run / "checkpoints" / table.checkpoint(cell).name)
    return str(run), by.overrides(), str(run / "again")


def differing(a: Path, b: Path) -> list[str]:
    """Names of the tensors that are not equal bit by bit."""
    one, two = CheckpointReader(a), CheckpointReader(b)
    assert one.tensors.keys() == two.tensors.keys()
    assert {name.split(".")[0] for name in one.tensors} == {"model", "optimizer"}
    return [name for name in one.tensors if not torch.equal(one.read(name), two.read(name))]


def check(table: CrossTable, cell: Cell, loading: list[Cell]) -> None:
    """Train ``cell``, and compare what each layout of ``loading`` takes up from its checkpoint."""
    table.train(cell.ranks, [(str(table.saved(cell)), cell.overrides(), None)])
    for ranks in sorted({by.ranks for by in loading}):
        table.train(ranks, [prepare(table, cell, by) for by in loading if by.ranks == ranks])
    wrong, lines = [], []
    for by in loading:
        run = table.loaded(cell, by)
        bits = differing(table.checkpoint(cell), run / "again" / f"step-{SAVED:08d}")
        expected, found = metrics(table.saved(cell), "lm_loss")[SAVED:], metrics(run, "lm_loss")
        assert len(expected) == len(found) == STEPS - SAVED
        error = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
        lines.append(f"{run.name:60s} {len(bits)} tensors differ, losses {error:.1e} apart")
        if bits or error > TOLERANCE:
            wrong.append(lines[-1])
    print("\n" + "\n".join(lines))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("cell", SAVING, ids=lambda cell: cell.name)
def test_every_layout_takes_up_what_one_saved(table: CrossTable, cell: Cell) -> None:
    check(table, cell, LOADING)


def test_every_engine_takes_up_a_model_of_layers_of_different_sizes(table: CrossTable) -> None:
    layouts = [("zero3", 2, 1, 2), ("ddp", 1, 2, 2), ("zero2", 2, 1, 2), ("zero1", 2, 2, 1), ("fsdp2", 1, 1, 1)]
    check(table, Cell("fsdp2", 2, 1, 2, extra=PRUNED), [Cell(*layout, extra=PRUNED) for layout in layouts])
