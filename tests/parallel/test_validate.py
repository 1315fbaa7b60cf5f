"""Layouts that cannot compute the model are refused before any process group is made, with the sizes that would do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch.distributed as dist

from fusiontree.config.load import load_config
from fusiontree.config.root import Config
from fusiontree.engines.config import ENGINES, FullyShardedSpec
from fusiontree.optim.config import OPTIMIZERS
from fusiontree.parallel.validate import check_layout, valid_tp
from fusiontree.utils.errors import UserError
from tests.parallel.table import MODEL, TRAINING


def config(model: dict[str, Any], parallel: dict[str, Any], training: dict[str, Any]) -> Config:
    return Config.model_validate(
        {
            "run_dir": "unused",
            "model": {**MODEL, **model},
            "training": {**TRAINING, "validation": {}, **training},
            "parallel": parallel,
            "data": {"train": "unused"},
        }
    )


GOOD = [
    ({}, {"tp": 2}, {}, 2),
    ({}, {"tp": 4}, {}, 4),
    ({}, {"tp": 2, "cp": 2}, {}, 8),
    ({}, {"cp": 4}, {}, 4),
    ({}, {"engine": "ddp", "tp": 2}, {}, 2),
    ({}, {"shard_size": 2}, {}, 4),
    ({}, {"reshard_after_forward": False, "tp": 2}, {}, 4),
    ({}, {"engine": "zero3", "tp": 2, "offload": "all", "zero3_persistence_threshold": 1000}, {}, 2),
    ({}, {"engine": "zero2", "cp": 2, "offload": "optimizer"}, {}, 2),
]
BAD = [
    ({}, {"tp": 2}, {}, 3, ["3 processes", "tp 2", "[1, 3]"]),
    ({}, {"tp": 8}, {}, 8, ["tp 8", "4 local + 4 global heads", "norm_groups 4", "[1, 2, 4]"]),
    ({"vocab_size": 261}, {"tp": 2}, {}, 2, ["vocab_size 261", "262"]),
    ({"global_heads": 2}, {"tp": 4}, {}, 4, ["6 local + 2 global heads", "3 local key/value heads", "[1]"]),
    ({"mamba": {**MODEL["mamba"], "norm_groups": 1}}, {"tp": 2}, {}, 2, ["norm_groups 1"]),
    ({}, {"cp": 2}, {"seq_len": 63}, 2, ["seq_len 63", "62 or 64"]),
    ({}, {"cp": 2, "tp": 2}, {"curriculum": [[2, 5]]}, 4, ["stage 0 of training.curriculum 2", "do: 4"]),
    ({"kernels": {"cross_entropy": "reference"}}, {"tp": 2}, {}, 2, ["cross_entropy=reference", "chunked"]),
    ({}, {"engine": "ddp", "shard_size": 2}, {}, 4, ["shard_size", "ddp"]),
    ({}, {"shard_size": 3}, {}, 4, ["shard_size 3", "[1, 2, 4]"]),
    ({}, {"engine": "zero3", "shard_size": 2}, {}, 4, ["shard_size", "zero3"]),
    ({}, {"offload": "optimizer"}, {}, 1, ["offload optimizer", "engine fsdp2", "zero3"]),
    ({}, {"engine": "zero2", "offload": "all"}, {}, 1, ["offload all", "engine zero2", "['none', 'optimizer']"]),
    ({}, {"engine": "zero1", "offload": "optimizer", "tp": 2}, {}, 2, ["parallel.tp above 1", "['none']", "zero3"]),
    ({}, {"engine": "zero2", "zero3_persistence_threshold": 5}, {}, 1, ["zero3_persistence_threshold", "zero2"]),
    ({}, {"engine": "zero3", "reshard_after_forward": False}, {}, 1, ["reshard_after_forward", "zero3"]),
]


@pytest.mark.parametrize(("model", "parallel", "training", "ranks"), GOOD)
def test_layouts_that_fit(model: dict, parallel: dict, training: dict, ranks: int) -> None:
    given = config(model, parallel, training)
    check_layout(given.model, given.parallel, given.training, ranks)


@pytest.mark.parametrize(("model", "parallel", "training", "ranks", "words"), BAD)
def test_layouts_that_do_not_fit_say_why(
    model: dict, parallel: dict, training: dict, ranks: int, words: list[str]
) -> None:
    given = config(model, parallel, training)
    with pytest.raises(UserError) as error:
        check_layout(given.model, given.parallel, given.training, ranks)
    for word in words:
        assert word in str(error.value)
    assert not dist.is_initialized()


def test_valid_sizes_are_those_that_pass() -> None:
    assert valid_tp(config({}, {}, {}).model) == [1, 2, 4]


def test_an_engine_without_its_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    given = config({}, {}, {})
    monkeypatch.setattr(
        "fusiontree.engines.config.find_spec", lambda name: None if name == "deepspeed" else find_spec(name)
    )
    zero = given.parallel.model_copy(update={"engine": "zero3"})
    with pytest.raises(UserError, match=r"needs the package deepspeed.*fusiontree\[deepspeed\]"):
        check_layout(given.model, zero, given.training, 1)


@pytest.mark.parametrize(("engine", "ranks", "fits"), [("ddp", 1, True), ("ddp", 2, False), ("zero3", 1, False)])
def test_an_optimizer_of_whole_matrices_needs_an_engine_that_keeps_them(
    engine: str, ranks: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMIZERS._parts, "adamw", replace(OPTIMIZERS.get("adamw"), whole_matrices=True))
    given = config({}, {"engine": engine}, {})
    if fits:
        check_layout(given.model, given.parallel, given.training, ranks)
        return
    with pytest.raises(UserError, match=rf"adamw needs whole matrices, and parallel.engine {engine} shards them"):
        check_layout(given.model, given.parallel, given.training, ranks)


def test_an_engine_from_a_plugin_states_its_own_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(FullyShardedSpec):
        def problems(self, *given: Any) -> Iterator[str]:
            yield from super().problems(*given)
            yield "parallel.engine slow runs on one process; use fsdp2"

    with pytest.raises(UserError, match=r"unknown engine 'slow'; known: fsdp2.*--plugin"):
        parallel_config("slow")
    monkeypatch.setitem(ENGINES._parts, "slow", Slow())
    given = config({}, {"engine": "slow", "shard_size": 3}, {})
    with pytest.raises(UserError, match="shard_size 3 must divide"):
        check_layout(given.model, given.parallel, given.training, 4)
    with pytest.raises(UserError, match="slow runs on one process"):
        check_layout(given.model, given.parallel.model_copy(update={"shard_size": None}), given.training, 4)


def parallel_config(engine: str) -> Config:
    """Read a configuration as a user gives it."""
    return load_config("configs/quickstart.yaml", [f"parallel.engine={engine}"])
