"""Every setting of release 0.1 that has another name now still takes effect under its former name."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusiontree.config.load import build_config, config_values, load_config
from fusiontree.config.moved import MOVED

FORMER: dict[str, Any] = {
    "training.eval_interval": 30,
    "training.eval_rows": 7,
    "training.spike_policy": "rewind",
    "training.spike_window": 16,
    "training.spike_threshold": 9.5,
    "training.max_spikes": 2,
    "training.replica_check_interval": 11,
    "training.straggler_interval": 12,
    "training.straggler_factor": 1.25,
    "training.health_check": "stop",
    "training.max_failed_starts": 3,
    "training.restart_backoff_s": 0.5,
    "training.hang_timeout_s": 33.0,
    "training.slow_timeout_s": 44.0,
}
"""Former name -> a value that is not the default."""


def at(values: dict[str, Any], dotted: str) -> Any:
    return reduce(lambda inner, key: inner[key], dotted.split("."), values)


def test_the_list_is_complete() -> None:
    assert FORMER.keys() <= MOVED.keys()


@pytest.mark.parametrize("former", FORMER)
def test_a_former_name_sets_the_same_value(former: str) -> None:
    value = FORMER[former]
    assert at(config_values(load_config("configs/quickstart.yaml")), MOVED[former]) != value
    config = load_config("configs/quickstart.yaml", [f"{former}={value}"])
    assert at(config_values(config), MOVED[former]) == value


def test_a_file_of_release_0_1_loads_as_its_present_spelling(tmp_path: Path) -> None:
    present = config_values(load_config("configs/quickstart.yaml", [f"{k}={v}" for k, v in FORMER.items()]))
    former = yaml.safe_load(yaml.safe_dump(present))
    del former["supervision"], former["training"]["spikes"], former["training"]["validation"]
    for dotted, value in FORMER.items():
        former["training"][dotted.split(".")[1]] = value
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(former))
    assert config_values(load_config(file)) == present
    assert config_values(build_config(former, "checkpoint")) == present
