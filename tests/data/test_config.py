"""The data section: what it accepts, and how it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fusiontree.data.config import DataConfig


def test_a_path_is_one_source() -> None:
    config = DataConfig(train="data/train")
    assert [(s.path, s.weight) for s in config.sources] == [("data/train", 1.0)]
    assert config.cache_folder == Path.home() / ".cache/fusiontree/shards"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": []}, "train is an empty list"),
        ({"train": ""}, "train names no dataset"),
        ({"train": [{"path": "a", "weight": 0.0}]}, "greater than 0"),
        ({"train": [{"path": "a", "weight": float("inf")}]}, "finite"),
        ({"train": [{"path": "a", "weight": 1.0}, {"path": "a/", "weight": 2.0}]}, "train lists 'a' twice"),
        ({"train": "a", "validation": "a/"}, "validation 'a/' is trained on"),
        ({"train": "a", "on_damage": "ignore"}, "'stop' or 'skip'"),
        ({"train": "a", "num_workers": -1}, "greater than or equal to 0"),
        ({"train": "a", "cache_size_gib": 0.0}, "greater than 0"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(values)
