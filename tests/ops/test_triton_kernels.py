"""The Triton kernels' arithmetic without a GPU, by Triton's interpreter, against the reference formulas."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("script", "results"),
    [
        ("interpreted_ssd", 64),
        ("interpreted_elementwise", 96),
        ("interpreted_fp8", 401),
        pytest.param("interpreted_adamw", 47, id="interpreted_adamw"),
        pytest.param("interpreted_step products attention", 21, id="interpreted_step"),
        pytest.param("interpreted_step", 38, id="all_of_interpreted_step", marks=pytest.mark.slow),
    ],
)
def test_kernels_equal_the_formulas(script: str, results: int) -> None:
    """In a process of its own: Triton decides when a kernel is defined whether it will be interpreted."""
    run = subprocess.run(
        [sys.executable, "-m", *f"tests.ops.{script}".split()],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line.rsplit(" ", 2) for line in run.stdout.splitlines()]
    assert len(lines) == results
    wrong = [f"{what} is off by {error}" for what, error, bar in lines if not float(error) < float(bar)]
    assert not wrong, "; ".join(wrong)


def test_a_row_of_256k_tokens_has_a_grid() -> None:
    """CUDA takes more than 65,535 programs along a grid's first axis alone."""
    from fusiontree.ops.gate.triton import _grid

    first, *others = _grid(torch.empty(1, 1 << 18, 2048, device="meta"))
    assert first > 65_535 >= max(others)


def test_tiles_of_the_scan_fit_what_a_gpu_has() -> None:
    """Beside them what Triton 3.6 takes at most, in KiB, by compiling the kernels for sm_90 and sm_80."""
    from fusiontree.ops.ssd.sizes import tiles

    h100, a100, consumer = 228 * 1024, 164 * 1024, 100 * 1024
    assert tiles(2, 64, 128, h100) == (128, 3)  # 131
    assert tiles(2, 128, 128, h100) == (64, 3)  # 162
    assert tiles(2, 64, 256, h100) == (64, 3)  # 154
    assert tiles(2, 128, 256, h100) == (64, 2)  # 193
    assert tiles(2, 64, 128, a100) == (64, 3)  # 80
    assert tiles(2, 64, 128, consumer) == (64, 3)  # 80
    assert tiles(2, 64, 256, consumer) == (32, 2)  # 56
    assert tiles(4, 64, 128, h100) == (64, 3)  # 146
    assert tiles(4, 64, 128, a100) == (64, 3)  # 146
    assert tiles(4, 64, 128, consumer) == (32, 2)  # 60
    assert tiles(4, 128, 128, h100) == (64, 2)
    assert tiles(4, 128, 128, consumer) is None  # 112


def test_sizes_without_a_kernel_are_computed_and_complained_of_once(caplog: pytest.LogCaptureFixture) -> None:
    from fusiontree.ops.ssd.reference import ScanInputs
    from fusiontree.ops.ssd.triton import ssd_triton

    for _ in range(2):
        x, bc = torch.ones(1, 4, 2, 16), torch.ones(1, 4, 1, 24)
        inputs = ScanInputs(x, torch.ones(1, 4, 2), -torch.ones(2), bc, bc, torch.ones(2), chunk_size=4)
        y, _state = ssd_triton(inputs)
        assert y.shape == x.shape
    assert [record.message.count("d_state 24 in") for record in caplog.records] == [1]


def test_sizes_without_a_kernel_go_to_the_next_backend(caplog: pytest.LogCaptureFixture) -> None:
    from fusiontree.ops.ssd.reference import ssd_reference
    from fusiontree.ops.ssd.triton import _without_kernels

    assert _without_kernels(24, 40, torch.device("cpu")) is ssd_reference
    assert "no kernel for mamba.head_dim 24 and d_state 40" in caplog.text and "backend reference" in caplog.text
