"""Which configurations FP8 products refuse, and what the planner knows of them."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from fusiontree.config.ineffective import without_effect
from fusiontree.engines.config import ENGINES, Sizes
from fusiontree.models.mixers import MIXERS
from fusiontree.models.mixers.attention import LocalGlobalAttention
from fusiontree.parallel.config import ParallelConfig
from fusiontree.parallel.fp8 import check_device, check_fp8, fp8_by_layer
from fusiontree.parallel.recompute_mix import FP8_RATE, MATRIX_FLOPS, seconds_by_layer
from fusiontree.training.config import Fp8Config, TrainingConfig
from fusiontree.utils.errors import UserError
from tests.helpers import tiny_config

FP8 = {"seq_len": 64, "max_steps": 3, "global_batch_size": 1, "precision": "bf16", "matmul_precision": "fp8"}


def check(training: dict[str, Any] | None = None, parallel: dict[str, Any] | None = None, **model: Any) -> None:
    settings = TrainingConfig.model_validate(FP8 | (training or {}))
    check_fp8(tiny_config(**model), ParallelConfig.model_validate(parallel or {}), settings)


def test_sizes_that_are_multiples_of_16_pass() -> None:
    check()
    check(parallel={"cp": 4})
    check(parallel={"tp": 2}, head_dim=16)
    check({"matmul_precision": "bf16"}, {"cp": 3}, hidden_size=40)


@pytest.mark.parametrize(
    ("training", "parallel", "model", "words"),
    [
        (
            {},
            {},
            {"hidden_size": 40},
            ["layers.0.align.up", "x 80", "multiples of 16", "mixer_out); set matmul_precision to bf16"],
        ),
        ({}, {"tp": 2}, {"head_dim": 4}, ["layers.0.attention.q_proj", "8 x 32 on one of parallel.tp 2 ranks"]),
        ({}, {"cp": 2, "tp": 4}, {"head_dim": 32}, ["training.seq_len 64", "parallel.cp 2 x parallel.tp 4", "is 8"]),
        ({"curriculum": [[8, 1]]}, {}, {}, ["stage 0 of training.curriculum 8", "multiple of 16"]),
        (
            {"fp8": {"exclude": []}},
            {},
            {},
            ["layers.0.gate.down (gate)", "8 x 32", "set training.fp8.exclude to [gate], or"],
        ),
        (
            {"fp8": {"exclude": ["mlp"]}},
            {},
            {"gate_rank": 8, "head_dim": 12, "num_heads": 1, "num_kv_heads": 1, "global_heads": 0},
            [
                "layers.0.gate.down (gate)",
                "(as do products of mixer_in, mixer_out)",
                "[mlp, gate, mixer_in, mixer_out], or",
            ],
        ),
        ({"fp8": {"first_bf16_layers": 1, "last_bf16_layers": 1}}, {}, {}, ["leaves none of the 2 layers"]),
    ],
)
def test_what_is_refused(training: Any, parallel: Any, model: Any, words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        check(training, parallel, **model)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_other_precisions_are_refused(precision: str) -> None:
    with pytest.raises(ValueError, match=f"needs precision bf16, and precision is {precision}"):
        TrainingConfig.model_validate(FP8 | {"precision": precision})


def test_a_mixer_that_does_not_support_fp8_is_refused_unless_its_products_are_excluded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Plain(LocalGlobalAttention):
        name: ClassVar[str] = "plain"
        fp8_products: ClassVar[dict[str, str]] = {}

    monkeypatch.setitem(MIXERS._parts, "plain", Plain)
    letters = {"letters": {"P": ["plain"]}, "layer_pattern": "PP"}
    with pytest.raises(UserError, match=r"mixer plain of layer 0 does not support training.matmul_precision fp8"):
        check(**letters)
    with pytest.raises(UserError, match=r"exclude to \[gate, mixer_in, mixer_out\]"):
        check({"fp8": {"exclude": ["gate", "mixer_in"]}}, **letters)
    check({"fp8": {"exclude": ["gate", "mixer_in", "mixer_out"]}}, **letters)
    first = {**letters, "layer_pattern": "PF"}
    with pytest.raises(UserError, match="mixer plain of layer 0"):
        check(**first)
    check({"fp8": {"first_bf16_layers": 1}}, **first)
    check({"fp8": {"last_bf16_layers": 1}}, **{**letters, "layer_pattern": "FP"})


def test_a_gpu_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(UserError, match="NVIDIA A100 has no FP8 products"):
        check_device(torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    check_device(torch.device("cuda"))


def test_one_rank_warns_of_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    import torch

    check_device(torch.device("cpu"), announce=False)
    assert not caplog.messages
    check_device(torch.device("cpu"))
    assert caplog.messages == ["training.matmul_precision fp8 on the CPU: products of FP8 values are computed in fp32"]


def test_the_planner_counts_products_and_kept_casts() -> None:
    model = tiny_config()
    training = TrainingConfig.model_validate(FP8)
    found = fp8_by_layer(model, training)
    hidden, inner, mlp = 32, 64, model.mlp_size
    heads = 4 * 8 + 2 * 2 * 8
    blocks = hidden * (2 * inner) + inner * hidden + hidden * heads + 4 * 8 * hidden
    blocks += (2 + 1 + 2) * hidden**2 + hidden**2 + 2 * hidden * mlp
    assert found == [blocks, blocks], "without bc_proj, dt, gate"
    plain, fast = (seconds_by_layer(model, 64, fp8) for fp8 in (None, found))
    saved = 6 * blocks / MATRIX_FLOPS * (1 - 1 / FP8_RATE)
    assert plain[0].repeated - fast[0].repeated == pytest.approx(saved)
    for name, ranks, passes, kept in (
        *(("ddp", 1, 2, True), ("fsdp2", 1, 2, True), ("ddp", 2, 2, True)),
        *(("ddp", 1, 1, False), ("fsdp2", 2, 2, False)),
    ):
        sizes = {"on_rank": 100.0, "shard": 100.0 / ranks, "block": 10.0, "element": 2, "stepped": 12}
        both = [
            ENGINES.get(name).memory(
                Sizes(**sizes, passes=passes, ranks=ranks, shard_ranks=ranks, fp8=fp8),  # type: ignore[arg-type]
                ParallelConfig.model_validate({"engine": name}),
            )
            for fp8 in (0.0, 50.0)
        ]
        assert both[1].states - both[0].states == (100.0 if kept else 0.0), name


def test_a_recipe_without_fp8_products_is_said_to_have_no_effect() -> None:
    from fusiontree.config.root import Config

    training = FP8 | {"matmul_precision": "bf16", "fp8": {"scaling": "row"}}
    train = [{"path": "x", "type": "synthetic", "weight": 1}]
    values = {"run_dir": "x", "model": tiny_config().model_dump(), "training": training, "data": {"train": train}}
    said = without_effect(Config.model_validate(values), 1)
    assert any(line.startswith("training.fp8=") and "matmul_precision is bf16" in line for line in said)
    assert Fp8Config().exclude == ["gate"]
