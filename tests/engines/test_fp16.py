"""fp16: steps that overflow on purpose, with the same losses, norms, scales and skips under every engine and layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusiontree.engines import torch_engine
from fusiontree.engines.common import LossScale
from tests.engines.fp16_worker import FIRST_SCALE, Cell, train
from tests.parallel.launch import free_ports, run_ranks

pytestmark = [pytest.mark.xdist_group("zero"), pytest.mark.timeout(600)]

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
LOW, HIGH = FIRST_SCALE / 2, FIRST_SCALE
OVERFLOW = f"overflow at loss scale {HIGH}"
LAYOUTS = {"dp2": (1, 1), "cp2": (2, 1), "tp2": (1, 2)}
"""cp and tp of two ranks."""
EVERY_CELL = [(engine, layout) for layout in LAYOUTS for engine in ENGINES]
SLOW = [("ddp", "cp2"), ("zero1", "cp2"), ("zero2", "cp2"), ("ddp", "tp2")]
FAST = [cell for cell in EVERY_CELL if cell not in SLOW]


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    """One process whose parameters are its own."""
    return train(("ddp", 1, 1))


def on_two_ranks(folder: Path, cells: list[tuple[str, str]], precision: str = "fp16") -> dict[tuple[str, str], Any]:
    """Return what engines saw in layouts of two ranks, all in one start of processes."""
    sizes: list[Cell] = [(engine, *LAYOUTS[layout]) for engine, layout in cells]
    ports = ",".join(map(str, free_ports(len(cells))))
    arguments = ["-m", "tests.engines.fp16_worker", str(folder / "found.json"), json.dumps(sizes), ports, precision]
    run_ranks(arguments, 2, folder, timeout=500)
    found = json.loads((folder / "found.json").read_text())
    return {cell: found["-".join(map(str, size))] for cell, size in zip(cells, sizes, strict=True)}


@pytest.fixture(scope="module")
def two_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """The cells whose tests are to run."""
    asked = [item.callspec.params.get("cell") for item in request.session.items if hasattr(item, "callspec")]
    return on_two_ranks(tmp_path_factory.mktemp("fp16"), [cell for cell in FAST if cell in asked])


def agree(found: dict[str, Any], reference: dict[str, Any]) -> None:
    """Assert that two runs skipped the same steps and saw the same numbers, but for fp16's roundings."""
    for key in ("scales", "skips", "state"):
        assert found[key] == reference[key], key
    assert found["losses"] == pytest.approx(reference["losses"], rel=1e-3)
    for mine, theirs in zip(found["norms"], reference["norms"], strict=True):
        assert mine == (None if theirs is None else pytest.approx(theirs, rel=1e-2))


def test_overflows_are_skipped_and_the_scale_follows(reference: dict[str, Any]) -> None:
    assert reference["skips"] == [OVERFLOW, None, None, OVERFLOW, None]
    assert reference["scales"] == [HIGH, LOW, LOW, HIGH, LOW]
    assert reference["state"] == {"optimizer_step": 3, "loss_scale": {"scale": LOW, "good_steps": 1}}


def test_losses_and_norms_are_those_of_the_unscaled_gradient(reference: dict[str, Any]) -> None:
    """fp32 skips nothing, so its steps are those on the batches that fp16 applied."""
    applied = [step for step, reason in enumerate(reference["skips"]) if reason is None]
    fp32 = train(("ddp", 1, 1), "fp32", steps=applied)
    assert fp32["skips"] == [None] * len(applied)
    assert [reference["losses"][step] for step in applied] == pytest.approx(fp32["losses"], rel=2e-3)
    assert [reference["norms"][step] for step in applied] == pytest.approx(fp32["norms"], rel=1e-2)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_rank_of_every_engine_agrees(
    engine: str, reference: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_engine, "is_local", lambda mesh: False)  # as if others shared the parameters
    agree(train((engine, 1, 1)), reference)


@pytest.mark.slow
@pytest.mark.parametrize("cell", FAST, ids="-".join)
def test_two_ranks_of_every_engine_agree(
    cell: tuple[str, str], two_ranks: dict[tuple[str, str], Any], reference: dict[str, Any]
) -> None:
    agree(two_ranks[cell], reference)


def test_two_chunks_have_the_gradient_of_the_row(tmp_path: Path) -> None:
    """fp32, because fp16 rounds by more than what passes between the chunks."""
    whole = train(("ddp", 1, 1), "fp32")
    (chunks,) = on_two_ranks(tmp_path, [("fsdp2", "cp2")], "fp32").values()
    assert chunks["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert chunks["norms"] == pytest.approx(whole["norms"], rel=1e-5)


@pytest.mark.slow
def test_two_ranks_agree_in_the_other_layouts(tmp_path: Path, reference: dict[str, Any]) -> None:
    for found in on_two_ranks(tmp_path, SLOW).values():
        agree(found, reference)


def test_the_scale_doubles_after_a_row_of_good_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossScale, "GROWTH_INTERVAL", 3)
    scale = LossScale(8.0)
    seen = []
    for overflow in (False, False, True, False, False, False, False, False, False):
        scale.update(overflow)
        seen.append((scale.scale, scale.good_steps))
    # The overflow ends the row: three more good steps are needed.
    halved = [(4.0, 0), (4.0, 1), (4.0, 2), (8.0, 0), (8.0, 1), (8.0, 2), (16.0, 0)]
    assert seen == [(8.0, 1), (8.0, 2), *halved]


def test_the_scale_stays_at_one_at_least() -> None:
    scale = LossScale(1.5)
    for _ in range(3):
        scale.update(overflow=True)
    assert scale.scale == 1.0
