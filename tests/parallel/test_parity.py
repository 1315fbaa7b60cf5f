"""Every layout computes the same model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fusiontree.checkpoint.load import load_model
from fusiontree.engines.config import ENGINES
from tests.end_to_end.runs import metrics
from tests.parallel.launch import Job, Table
from tests.parallel.mutations import MUTATIONS, OF_GATED_DELTA_NET
from tests.parallel.table import FAST, GROUPS, MODEL, NOISE, REFERENCE, STEPS, TEACHER, TOLERANCE, TRAINING, Cell

MUTATED_STEPS = 5
"""Steps of a run with a mistake: what is not seen in these is not seen."""
COMPARED = ("loss", "lm_loss", "grad_norm", "load_balance_loss", "entropy_loss", "validation_loss")
"""Metrics that all layouts have in common."""

pytestmark = [pytest.mark.xdist_group("parity"), pytest.mark.timeout(3600)]


class ParityTable(Table):
    """Runs cells and compares them with their reference."""

    def __init__(
        self, folder: Path, model: dict[str, Any] = MODEL, steps: int = STEPS, plugins: Sequence[str] = ()
    ) -> None:
        training = {**TRAINING, "max_steps": steps, "validation": {**TRAINING["validation"], "interval": steps}}
        sections = {"plugins": list(plugins), "model": model, "training": training}
        super().__init__(folder, {**sections, "checkpoint": {"save_interval": 0}})

    def run(self, cells: list[Cell], mutations: list[str] | None = None) -> None:
        """Train the cells, which are of one number of ranks, each under its mutation; finished cells are not run."""
        names: list[str | None] = list(mutations) if mutations else [None] * len(cells)
        jobs: list[Job] = [
            (str(self.run_dir(c, m)), c.overrides() + ([f"training.exit_at_step={MUTATED_STEPS}"] if m else []), m)
            for c, m in zip(cells, names, strict=True)
        ]
        teacher = str(self.run_dir(REFERENCE))
        jobs = [
            (folder, [override.replace(TEACHER, teacher) for override in overrides], mutation)
            for folder, overrides, mutation in jobs
            if not Path(folder).exists()
        ]
        if jobs:
            (ranks,) = {cell.ranks for cell in cells}
            self.train(ranks, jobs)

    def run_dir(self, cell: Cell, mutation: str | None = None) -> Path:
        """Where a cell's run is."""
        return self.folder / "runs" / (f"{mutation.replace(' ', '-')}-{cell.name}" if mutation else cell.name)

    def error(self, cell: Cell, mutation: str | None = None, keys: Sequence[str] = COMPARED) -> float:
        """Greatest relative difference of ``keys`` (losses and gradient norm) from the reference over all steps.

        Counts of tokens and the hash of the data must be equal exactly.
        """
        for key in ("tokens", "tokens_hash"):
            mine, theirs = metrics(self.run_dir(cell, mutation), key), metrics(self.run_dir(cell.reference), key)
            assert mine == theirs[: len(mine)], f"{cell.name}: {key} differs from {cell.reference.name}"
        worst = 0.0
        for key in keys:
            mine, theirs = metrics(self.run_dir(cell, mutation), key), metrics(self.run_dir(cell.reference), key)
            if mutation:
                theirs = theirs[: len(mine)]
            assert len(mine) == len(theirs)
            worst = max([worst, *(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(mine, theirs, strict=True))])
        return worst


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ParityTable:
    table = ParityTable(tmp_path_factory.mktemp("parity"))
    table.run([REFERENCE, NOISE])
    return table


def check(table: ParityTable, cells: list[Cell]) -> None:
    table.run(sorted({cell.reference for cell in cells}))
    noise = table.error(NOISE)
    lines = [f"{'noise floor (other accumulation)':60s} {noise:.1e}"]
    wrong = []
    for cell in cells:
        error = table.error(cell)
        lines.append(f"{cell.name:60s} {error:.1e}")
        final, reference = (load_model(table.run_dir(c))[0].state_dict() for c in (cell, cell.reference))
        far = max(float((final[name] - values).abs().max()) for name, values in reference.items())
        if error > TOLERANCE or far > 1e-4:
            wrong.append(f"{cell.name}: error {error:.2e}, parameters {far:.2e} apart")
    print("\n" + "\n".join(lines))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("ranks", sorted({cell.ranks for cell in FAST}))
def test_the_layouts_of_the_fast_table_agree(table: ParityTable, ranks: int) -> None:
    cells = [cell for cell in FAST if cell.ranks == ranks]
    table.run(cells)
    check(table, cells)


def test_the_fast_table_has_every_engine_along_every_axis() -> None:
    seen = {(c.engine, axis) for c in FAST for axis in ("dp", "cp", "tp") if getattr(c, axis) > 1}
    ours = [name for name, spec in ENGINES.items() if type(spec).__module__.startswith("fusiontree.")]
    assert seen == {(engine, axis) for engine in ours for axis in ("dp", "cp", "tp")}


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_every_layout_agrees(table: ParityTable, group: str) -> None:
    table.run(GROUPS[group])
    check(table, GROUPS[group])


def check_seen(table: ParityTable, names: list[str]) -> None:
    """Each safeguard taken away moves loss or gradient norm at least ten times the tolerance within a few steps."""
    cells = {name: (MUTATIONS | OF_GATED_DELTA_NET)[name].cell for name in names}
    table.run(list(cells.values()), names)
    errors = {name: table.error(cell, name) for name, cell in cells.items()}
    print("\n" + "\n".join(f"{name:60s} {error:.1e}" for name, error in errors.items()))
    unseen = [name for name, error in errors.items() if error < 10 * TOLERANCE]
    assert not unseen, errors


def test_mistakes_of_the_fast_table_are_seen(table: ParityTable) -> None:
    check_seen(table, ["no gradient sum of sequence parallel weights", "state not passed", "gradient averaged (ddp)"])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", sorted({mutation.cell.ranks for mutation in MUTATIONS.values()}))
def test_every_mistake_is_seen(table: ParityTable, ranks: int) -> None:
    check_seen(table, [name for name, mutation in MUTATIONS.items() if mutation.cell.ranks == ranks])
