"""Every layout computes the same model with FP8 products, within the tolerance of this precision.

A product of FP8 values amplifies rounding: a value that another order of summation moves over the border between two
FP8 values moves by up to an eighth. Layouts therefore differ as much as two accumulations of one process do, which is
measured beside them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.table import MODEL, RECORDED, Cell
from tests.parallel.test_parity import ParityTable
from tests.tiny import changed

SIZES = changed(MODEL, head_dim=16)  # multiples of 16 on each of four ranks
FP8 = ("training.precision=bf16", "training.matmul_precision=fp8")
ROW = (*FP8, "training.fp8.scaling=row", "training.fp8.gradient_type=e5m2")
FP8_TOLERANCE = 3e-2
"""Relative, of losses and gradient norm at every step; :data:`tests.parallel.table.TOLERANCE` of fp32 is 1e-5."""
LOSS_TOLERANCE = 2e-3
"""Relative, of the loss."""
NOISE = Cell("ddp", accumulation=4, extra=FP8)
FAST = [Cell("ddp", 1, 2, 1, extra=FP8), Cell("fsdp2", 1, 1, 2, "selective", extra=FP8)]
FAST_STEPS = 4
SLOW = {
    "two ranks": [
        *FAST,
        Cell("fsdp2", 2, 1, 1, extra=FP8),
        Cell("zero1", 1, 1, 2, extra=FP8),
        Cell("zero2", 2, 1, 1, "full", extra=FP8),
        Cell("zero3", 1, 2, 1, extra=FP8),
        Cell("fsdp2", 1, 2, 1, "auto", extra=FP8),
        Cell("ddp", 1, 1, 2, extra=(*FP8, *RECORDED)),
    ],
    "two ranks, scales of rows": [Cell("fsdp2", 1, 1, 2, extra=ROW), Cell("ddp", 1, 2, 1, "full", extra=ROW)],
    "four ranks": [Cell("fsdp2", 1, 2, 2, "full", extra=FP8), Cell("ddp", 1, 1, 4, extra=FP8)],
}
"""Of 20 steps: every axis and engine, recomputation, recorded steps, key heads that several ranks share."""

pytestmark = [pytest.mark.xdist_group("fp8 parity"), pytest.mark.timeout(3600)]


def check(table: ParityTable, cells: list[Cell]) -> None:
    table.run(sorted({cell.reference for cell in cells}))
    ranks = [cell for cell in cells if cell.ranks > 1]
    table.run(ranks)
    lines, wrong = [], []
    for cell in cells:
        error, loss = table.error(cell), table.error(cell, keys=("loss", "validation_loss"))
        lines.append(f"{cell.name:80s} {error:.1e} loss {loss:.1e}")
        if error > FP8_TOLERANCE or loss > LOSS_TOLERANCE:
            wrong.append(lines[-1])
    print("\n" + "\n".join(lines))
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_the_layouts_of_the_fast_table_agree(tmp_path: Path) -> None:
    check(ParityTable(tmp_path, model=SIZES, steps=FAST_STEPS), FAST)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ParityTable:
    table = ParityTable(tmp_path_factory.mktemp("fp8"), model=SIZES)
    table.run([NOISE.reference, NOISE])
    return table


@pytest.mark.slow
@pytest.mark.parametrize("group", SLOW)
def test_every_layout_agrees(table: ParityTable, group: str) -> None:
    check(table, [NOISE, *SLOW[group]])
