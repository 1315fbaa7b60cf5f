from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fusiontree.training.teacher import read_teacher
from fusiontree.utils.errors import UserError
from tests.helpers import tiny_config


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {**tiny_config().model_dump(mode="json"), "later": 1},
            "describes no model of this version .model.later: Extra inputs",
        ),
        (None, "does not describe its model"),
    ],
)
def test_a_teacher_of_another_version_is_refused(tmp_path: Path, model: Any, message: str) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "state.json").write_text(json.dumps({"config": {"model": model}}))
    config: Any = SimpleNamespace(training=SimpleNamespace(teacher=str(tmp_path)), model=tiny_config())
    with pytest.raises(UserError, match=message):
        read_teacher(config)
