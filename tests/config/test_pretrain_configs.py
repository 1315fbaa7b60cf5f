"""The two flagship configurations load, are what they are described as, and fit the layouts that they are made for."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusiontree.config.load import load_config
from fusiontree.config.root import Config
from fusiontree.parallel.validate import check_layout, valid_tp
from fusiontree.utils.errors import UserError

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"


def load(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / f"{name}.yaml", overrides)


def check(config: Config, world_size: int) -> None:
    check_layout(config.model, config.parallel, config.training, world_size)


@pytest.mark.parametrize("name", ["pretrain_v1", "pretrain_v2"])
def test_what_both_are(name: str) -> None:
    config = load(name)
    model, training = config.model, config.training
    assert (model.hidden_size, model.num_layers, model.num_heads, model.window_size) == (4096, 32, 32, 1024)
    lengths = [length for length, _ in training.curriculum or []] + [training.seq_len]
    assert lengths == [4096, 8192, 16384, 32768]
    assert sum(steps for _, steps in training.curriculum or []) < training.max_steps
    assert (training.precision, training.lr_scheduler, config.parallel.engine) == ("bf16", "cosine", "zero3")
    assert training.warmup_steps > 0
    check(config, 64)
    assert training.global_batch_size > 64 * training.micro_batch_size // config.parallel.tp  # it accumulates


def test_heads_and_the_tensor_parallel_sizes_that_they_allow() -> None:
    first, second = load("pretrain_v1").model, load("pretrain_v2").model
    assert (first.local_heads, first.global_heads) == (30, 2)
    assert valid_tp(first) == [1, 2]
    assert (second.local_heads, second.global_heads, second.local_kv_heads, second.global_kv_heads) == (24, 8, 12, 4)
    assert valid_tp(second) == [1, 2, 4]
    with pytest.raises(UserError, match="each kind must divide by 4"):
        check(load("pretrain_v1", "parallel.tp=4"), 64)
    check(load("pretrain_v2", "parallel.tp=4", "parallel.cp=2"), 64)
