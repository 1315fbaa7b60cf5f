"""The cross table: what one layout saves, any other loads, bit by bit, and goes on with the same losses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

from fusiontree.checkpoint.reader import CheckpointReader
from tests.end_to_end.runs import CONFIG, build_data, metrics
from tests.parallel.launch import free_ports, run_ranks
from tests.parallel.table import MODEL, ROWS, TRAINING

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cross"), pytest.mark.timeout(7200)]

SAVED, STEPS = 5, 15
TOLERANCE = 1e-6


class Place(NamedTuple):
    """One layout."""

    engine: str
    ranks: int
    cp: int = 1
    tp: int = 1
    extra: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the layout, fit for a folder."""
        extra = "".join("-" + e.rpartition(".")[2].replace("=", "") for e in self.extra)
        return f"{self.engine}-{self.ranks // self.cp // self.tp}-{self.cp}-{self.tp}{extra}"

    def overrides(self) -> list[str]:
        """Settings that make it."""
        dp = self.ranks // self.cp // self.tp
        return [
            f"parallel.engine={self.engine}",
            f"parallel.cp={self.cp}",
            f"parallel.tp={self.tp}",
            f"training.micro_batch_size={ROWS // dp // 2}",
            *self.extra,
        ]


SAVING = [
    Place("fsdp2", 4),
    Place("fsdp2", 4, tp=2),
    Place("fsdp2", 4, cp=2, tp=2),
    Place("fsdp2", 4, extra=("parallel.shard_size=2",)),
    Place("zero3", 4),
    Place("zero3", 4, cp=2),
    Place("zero3", 4, tp=2),
    Place("zero2", 4),
    Place("ddp", 4),
    Place("fsdp2", 1),
]
LOADING = [*SAVING, Place("fsdp2", 2), Place("zero3", 2), Place("ddp", 2, tp=2)]


class Table:
    """Runs layouts, several of one number of ranks in one start of processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        data = build_data(folder)
        training = TRAINING | {"max_steps": STEPS, "validation": {}}
        values = {**CONFIG, "model": MODEL, "training": training}
        values["checkpoint"] = {"save_interval": SAVED, "keep_last": 0}
        values["data"] = {"train": str(data / "train"), "validation": str(data / "validation")}
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(values))

    def run(self, ranks: int, jobs: list[tuple[str, list[str], str | None]]) -> None:
        """Train each job in turn."""
        ports = ",".join(map(str, free_ports(len(jobs))))
        arguments = ["-m", "tests.checkpoint.cross_worker", str(self.config), json.dumps(jobs), ports]
        run_ranks(arguments, ranks, self.folder, timeout=180.0 * len(jobs))

    def saved(self, place: Place) -> Path:
        """Run folder of the layout that saves."""
        return self.folder / "saved" / place.name

    def loaded(self, place: Place, by: Place) -> Path:
        """Run folder of ``by``, started from what ``place`` saved."""
        return self.folder / "loaded" / f"{place.name}-by-{by.name}"

    def checkpoint(self, place: Place) -> Path:
        """What ``place`` saved."""
        return self.saved(place) / "checkpoints" / f"step-{SAVED:08d}"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return Table(tmp_path_factory.mktemp("cross"))


def prepare(table: Table, place: Place, by: Place) -> tuple[str, list[str], str | None]:
    """Make a run folder that holds nothing but what ``place`` saved."""
    run = table.loaded(place, by)
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(table.saved(place) / "config.yaml", run / "config.yaml")
    shutil.copytree(table.checkpoint(place), run / "checkpoints" / table.checkpoint(place).name)
    return str(run), by.overrides(), str(run / "again")


def differing(a: Path, b: Path) -> list[str]:
    """Names of the tensors that are not equal bit by bit."""
    one, two = CheckpointReader(a), CheckpointReader(b)
    assert one.tensors.keys() == two.tensors.keys()
    assert {name.split(".")[0] for name in one.tensors} == {"model", "optimizer"}
    return [name for name in one.tensors if not torch.equal(one.read(name), two.read(name))]


@pytest.mark.parametrize("place", SAVING, ids=lambda place: place.name)
def test_every_layout_takes_up_what_one_saved(table: Table, place: Place) -> None:
    table.run(place.ranks, [(str(table.saved(place)), place.overrides(), None)])
    for ranks in sorted({by.ranks for by in LOADING}):
        table.run(ranks, [prepare(table, place, by) for by in LOADING if by.ranks == ranks])
    wrong, lines = [], []
    for by in LOADING:
        run = table.loaded(place, by)
        bits = differing(table.checkpoint(place), run / "again" / f"step-{SAVED:08d}")
        expected, found = metrics(table.saved(place), "lm_loss")[SAVED:], metrics(run, "lm_loss")
        assert len(expected) == len(found) == STEPS - SAVED
        error = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
        lines.append(f"{run.name:60s} {len(bits)} tensors differ, losses {error:.1e} apart")
        if bits or error > TOLERANCE:
            wrong.append(lines[-1])
    print("\n" + "\n".join(lines))
    assert not wrong, "\n".join(wrong)
