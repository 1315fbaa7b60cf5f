"""kill -9 while saving: nothing that was saved is lost, nothing half saved is taken for whole."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.runs import ROOT, environment


def campaign(*arguments: object) -> list[int]:
    command = [sys.executable, "-m", "tests.checkpoint.killed_saver", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return [int(number) for number in re.findall(r"\d+", done.stdout)]


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_at_changes_of_the_file_system(tmp_path: Path, stride: int) -> None:
    (places,) = campaign(tmp_path / "run", "each", stride)
    assert places > 200


@pytest.mark.slow
def test_at_some_random_moments(tmp_path: Path) -> None:
    campaign(tmp_path / "run", "random", 10, 1)


@pytest.mark.slow
def test_at_a_hundred_random_moments(tmp_path: Path) -> None:
    hit, count = campaign(tmp_path / "run", "random", 100, 2)
    assert count == 100 and hit > 20
