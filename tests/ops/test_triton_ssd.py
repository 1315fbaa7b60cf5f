"""The scan's Triton kernels without a GPU, by Triton's interpreter, against the plain formula in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def test_kernels_equal_the_formula() -> None:
    """In a process of its own: Triton decides when a kernel is defined whether it will be interpreted."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.interpreted_ssd"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line.rsplit(" ", 2) for line in run.stdout.splitlines()]
    assert len(lines) == 5 * 9
    wrong = [f"{what} is off by {error}" for what, error, bar in lines if not float(error) < float(bar)]
    assert not wrong, "; ".join(wrong)
