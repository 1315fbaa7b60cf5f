from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.runs import build_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_data(tmp_path_factory.mktemp("corpus"))
