"""Start, save and resume at 1,024 ranks of a model of 11.5 billion parameters: seconds and megabytes per rank."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.runs import ROOT, environment

SECONDS, MIB = 5.0, 300.0


def simulate(folder: Path, rank: int) -> dict:
    command = [sys.executable, "-m", "tests.checkpoint.scale_worker", str(folder), str(rank)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_thousand_ranks(tmp_path: Path) -> None:
    for rank in (0, 1, 1023):  # rank 0 writes what the others read
        result = simulate(tmp_path, rank)
        assert result["tensors"] == 3 * 771 and result["jobs"] > 1000
        sizes = {file.name: file.stat().st_size >> 20 for file in tmp_path.iterdir()}
        print(f"rank {rank}: {result['phases']}, MiB of files {sizes}")
        for name, phase in result["phases"].items():
            assert phase["seconds"] < SECONDS and phase["mib"] < MIB, (rank, name, phase)
    assert sizes["manifest.json"] == 0 and sizes["tensors.index"] < 200
