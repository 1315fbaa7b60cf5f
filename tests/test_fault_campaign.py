"""A seeded part of the fault campaign; the whole is ``python -m tools.fault_campaign --faults 200``."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from tools.fault_campaign import ENDING, PASSING, main, plan_faults
from tools.fault_injection import Fault
from tools.fault_runs import FaultyRun, References
from tools.fault_starts import build_corpus


def test_the_same_seed_plans_the_same_faults() -> None:
    kinds = [*ENDING, *PASSING]
    plans = [[plan_faults(Random(f"0 {run}"), kinds) for run in range(200)] for _ in range(2)]
    assert plans[0] == plans[1]
    assert {fault.kind for plan in plans[0] for fault in plan} == set(kinds)


@pytest.mark.slow
@pytest.mark.xdist_group("training")
@pytest.mark.timeout(900)
def test_no_fault_changes_a_loss_or_goes_unexplained(tmp_path: Path) -> None:
    out = tmp_path / "campaign"
    code = main(["--faults", "9", "--seed", "7", "--out", str(out), "--parallel", "2"])
    summary = json.loads((out / "summary.json").read_text())
    assert code == 0, [line for line in (out / "faults.jsonl").read_text().splitlines() if '"ok": false' in line]
    assert summary["faults"] >= 9
    assert summary["runs"] == summary["finished_with_reference_losses"]


@pytest.mark.slow
@pytest.mark.xdist_group("training")
@pytest.mark.timeout(300)
def test_the_comparison_sees_a_loss_that_differs(tmp_path: Path) -> None:
    corpus = build_corpus(tmp_path / "corpus")
    references = References(tmp_path, corpus, "fsdp2")
    spiked = FaultyRun(tmp_path / "run-0", corpus, references, "fsdp2", Random(0))
    result = spiked.go([Fault("spike", 0, 5, section="forward", amount=1.001)])
    spiked.remove()
    assert not spiked.folder.exists()
    assert not result["ok"]
    assert "loss" in result["problem"]
    assert "the reference has" in result["problem"]
