from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.runs import build_data, train, write_config
from tests.slurm.cluster import SlurmCluster
from tests.slurm.jobs import LONG


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_data(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="session")
def reference(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of one process, long enough to be interrupted."""
    folder = tmp_path_factory.mktemp("reference")
    done = train(write_config(folder, data), *LONG, timeout=700)
    assert done.returncode == 0, done.stderr
    return folder / "run"
