"""Opening ten billion tokens in twenty million documents and resuming anywhere: at most a second and 150 MB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fusiontree.data.format import read_dataset
from tests.data.datasets import sparse_dataset

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("shards", "documents", "workers"),
    [
        (1000, 20_000, 1),
        pytest.param(1000, 20_000, 4, marks=pytest.mark.slow),
        pytest.param(100, 200_000, 0, marks=pytest.mark.slow),
        pytest.param(100, 200_000, 4, marks=pytest.mark.slow),
        pytest.param(20_000, 1000, 1, marks=pytest.mark.slow),
    ],
)
def test_ten_billion_tokens(tmp_path: Path, shards: int, documents: int, workers: int) -> None:
    folder = sparse_dataset(tmp_path / "d", shards, documents, 500)
    info = read_dataset(folder)
    assert (info.tokens, info.documents) == (10**10, 20 * 10**6)
    command = [sys.executable, "-m", "tests.data.resume_cost", str(folder), str(workers)]
    # The best of three: other tests on the same machine delay one by chance.
    results = [json.loads(subprocess.check_output(command, cwd=ROOT)) for _ in range(1)]
    if results[0]["seconds"] > 1:
        results += [json.loads(subprocess.check_output(command, cwd=ROOT)) for _ in range(2)]
    print(results)
    assert min(result["seconds"] for result in results) <= 1
    assert max(result["megabytes"] for result in results) <= 150
    assert max(result["state"] for result in results) <= 1000
