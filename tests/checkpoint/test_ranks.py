"""Several ranks save and load together."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusiontree.checkpoint.verify import verify
from tests.parallel.launch import run_ranks

SLOW = ("one_rank_fails", "damage_on_one_rank")


@pytest.mark.parametrize("test", ["kinds", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_three_ranks(tmp_path: Path, test: str) -> None:
    folder = tmp_path / "checkpoints"
    run_ranks(["-m", "tests.checkpoint.ranks_worker", str(folder), test], 3, tmp_path, timeout=200)
    verify(folder / "step-00000001")
