"""Gated DeltaNet under every layout: loss and gradient norm of one process, and mistakes that must show."""

from __future__ import annotations

import pytest

from tests.parallel.mutations import OF_GATED_DELTA_NET
from tests.parallel.table import (
    CONCATENATED,
    DELTA,
    IN_TURN,
    MEAN,
    MODEL,
    NOISE,
    NORMED,
    RECORDED,
    REFERENCE,
    Cell,
)
from tests.parallel.test_parity import ParityTable, check, check_seen

pytestmark = [pytest.mark.xdist_group("gated delta net"), pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ParityTable:
    """Packed documents, slow decay, no Mamba: what is lost between chunks can only be the state of this mixer.

    Ten steps with a larger norm_eps. A query may be orthogonal to the keys of a document's first tokens; the norm of a
    head then divides by almost zero, and rounding of one process alone moves a gradient norm.
    """
    model = {**MODEL, "layer_pattern": "GDAG", "norm_eps": 1e-3, **DELTA}
    return ParityTable(tmp_path_factory.mktemp("delta"), model, steps=10)


FAST = Cell("fsdp2", 1, 2, 1, "selective")
GROUPS = {
    "four ranks": [
        Cell("fsdp2", 1, 4, 1),
        Cell("fsdp2", 1, 1, 4, "selective"),  # fewer key heads than ranks
        Cell("fsdp2", 1, 2, 2, "full"),
        Cell("zero3", 1, 2, 2, "selective"),
        Cell("ddp", 1, 2, 2),
        Cell("zero1", 2, 1, 2),
        Cell("zero2", 2, 2, 1, "full"),
    ],
    "two ranks": [
        Cell("zero3", 2, 1, 1),
        Cell("fsdp2", 1, 2, 1, "auto"),
        Cell("ddp", 1, 2, 1),
        Cell("fsdp2", 1, 1, 2, "full"),
    ],
    "recorded steps": [Cell("ddp", *axis, extra=RECORDED) for axis in ((1, 2, 1), (1, 1, 2))],
    "mixes of branches": [
        # At norm_eps 1e-3 its tenth step is ill-conditioned: 3e-6 between two accumulations of one process.
        Cell("fsdp2", 1, 1, 2, "full", extra=(*NORMED, "model.norm_eps=1e-2")),
        Cell("ddp", 1, 2, 1, extra=MEAN),
        Cell("zero3", 1, 2, 1, extra=CONCATENATED),
        Cell("fsdp2", 1, 2, 1, "selective", extra=IN_TURN),
    ],
}


@pytest.mark.slow
def test_context_parallelism_has_the_loss_and_gradient_norm_of_one_process(table: ParityTable) -> None:
    table.run([REFERENCE, NOISE])
    table.run([FAST])
    check(table, [FAST])


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_every_layout_agrees(table: ParityTable, group: str) -> None:
    pytest.importorskip("deepspeed")
    table.run([REFERENCE, NOISE])
    table.run(GROUPS[group])
    check(table, GROUPS[group])


def test_a_state_that_is_not_passed_on_is_seen(table: ParityTable) -> None:
    table.run([REFERENCE])
    check_seen(table, ["affine state not passed"])


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_GATED_DELTA_NET)
def test_every_mistake_is_seen(table: ParityTable, name: str) -> None:
    table.run([REFERENCE])
    check_seen(table, [name])
