"""Settings that contradict each other are refused, those without effect are named, and numbers are finite."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusiontree.config.ineffective import idle_work, without_effect
from fusiontree.config.load import load_config
from fusiontree.config.root import Config
from fusiontree.training.config import TrainingConfig
from fusiontree.training.schedule import learning_rate
from fusiontree.utils.errors import UserError
from tests.config.test_load import BASE


def config(tmp_path: Path, *overrides: str) -> Config:
    (tmp_path / "run.yaml").write_text(BASE)
    return load_config(tmp_path / "run.yaml", overrides)


def test_a_configuration_in_which_all_has_an_effect_says_nothing(tmp_path: Path) -> None:
    assert without_effect(config(tmp_path), 1) == []
    given = ["training.lr_scheduler=wsd", "training.decay_steps=3", "training.spikes.policy=skip"]
    given += ["training.spikes.window=16", "data.train=s3://bucket/x", "data.cache_size_gib=9", "data.validation=v"]
    given += ["training.validation={interval: 5, rows: 8}", "checkpoint.keep_best=2", "logging.trackers=[wandb]"]
    given += ["logging.wandb.project=p", "supervision.straggler_interval=5", "training.micro_batch_size=2"]
    assert without_effect(config(tmp_path, *given), 2) == []


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ("training.decay_steps=3", "training.decay_steps=3"),
        ("training.lr_scheduler=constant training.min_lr_ratio=0.5", "training.min_lr_ratio=0.5"),
        ("training.warmup_steps=10 training.lr_scheduler=linear", "training.lr_scheduler=linear"),
        ("training.exit_at_step=10", "training.exit_at_step=10"),
        ("training.recompute_layers=1", "training.recompute_layers=1"),
        (
            "training.activation_checkpointing=auto training.memory_limit=0.5 training.recompute_layers=1",
            "training.recompute_layers=1",
        ),
        ("training.memory_limit=0.5", "training.memory_limit=0.5"),
        ("training.spikes.threshold=3.0", "training.spikes.threshold=3.0"),
        ("training.spikes.policy=skip", "training.spikes.policy=skip"),
        ("training.validation.rows=3", "training.validation.rows=3"),
        ("training.curriculum=[[32,10]]", "training.seq_len=64"),
        ("training.gate_margin=0.2", "training.gate_margin=0.2"),
        ("training.micro_batch_size=64", "training.micro_batch_size=64"),
        ("model.layer_pattern=MM model.window_size=9", "model.window_size=9"),
        ("model.layer_pattern=AA model.mamba.d_state=64", "model.mamba="),
        (
            "model.layer_pattern=MM model.mixers.gated_delta_net.key_dim=64",
            "model.mixers.gated_delta_net.key_dim=64 has no effect: no layer of model.layer_pattern",
        ),
        (
            "model.letters={D:[gated_delta_net]} model.layer_pattern=DD model.kernels.gated_delta=fla "
            "model.mixers.gated_delta_net={'chunk_size':32,'value_dim':16,'key_dim':64}",
            "model.mixers.gated_delta_net.chunk_size=32 has no effect: model.kernels.gated_delta fla",
        ),
        ("model.layer_pattern=AA model.drop_branch_prob=0.1", "model.drop_branch_prob=0.1"),
        ("model.global_heads=4 model.window_size=9", "model.window_size=9"),
        ("data.cache_size_gib=3.0", "data.cache_size_gib=3.0"),
        ("data.storage_options={'anon':true}", "data.storage_options="),
        ("data.allow_pipe=true", "data.allow_pipe=True"),
        ("data.shuffle=false data.shuffle_shards=3", "data.shuffle_shards=3"),
        ("data.num_workers=0 data.prefetch_steps=9", "data.prefetch_steps=9"),
        ("data.max_skipped_rows=3", "data.max_skipped_rows=3"),
        ("checkpoint.keep_last=0 checkpoint.keep_every=5", "checkpoint.keep_every=5"),
        ("checkpoint.keep_best=2", "checkpoint.keep_best=2"),
        ("evaluation.training_tasks=[copy]", "evaluation.training_tasks=['copy']"),
        ("logging.wandb.project=x", "logging.wandb.project=x"),
        ("logging.tensorboard.folder=x", "logging.tensorboard.folder=x"),
        ("supervision.straggler_interval=5", "supervision.straggler_interval=5"),
        ("parallel.reshard_after_forward=false", "parallel.reshard_after_forward=False"),
    ],
)
def test_a_setting_without_effect_says_so(tmp_path: Path, overrides: str, name: str) -> None:
    (note, *_) = [n for n in without_effect(config(tmp_path, *overrides.split()), 1) if n.startswith(name)]
    assert "has no effect: " in note


def test_filler_rows_are_named(tmp_path: Path) -> None:
    assert idle_work(config(tmp_path, "training.micro_batch_size=64"), 1) == []
    assert idle_work(config(tmp_path, "training.micro_batch_size=2"), 2) == []
    assert "2 of 6 rows" in idle_work(config(tmp_path), 3)[0]
    assert "4 of 8 rows" in idle_work(config(tmp_path), 8)[0]
    assert "2 of 6 rows" in idle_work(config(tmp_path, "training.micro_batch_size=3"), 1)[0]


def schedule(**settings: object) -> TrainingConfig:
    values = {"seq_len": 8, "global_batch_size": 1, "learning_rate": 1.0, "min_lr_ratio": 0.0, "lr_scheduler": "wsd"}
    return TrainingConfig.model_validate(values | settings)


def test_a_decay_longer_than_what_is_left_is_refused() -> None:
    with pytest.raises(ValueError, match="decay_steps 100 is more than the 8 steps after warm-up"):
        schedule(max_steps=10, warmup_steps=2, decay_steps=100)
    with pytest.raises(ValueError, match="decay_steps 9"):
        schedule(max_steps=10, warmup_steps=2, decay_steps=9)
    schedule(max_steps=10, warmup_steps=2, decay_steps=100, lr_scheduler="cosine")  # without effect, which is said


@pytest.mark.parametrize(("steps", "warmup"), [(10, 2), (100, 95), (100, 0), (30, 29), (5, 5), (1, 0)])
def test_no_wsd_schedule_jumps_after_warmup(steps: int, warmup: int) -> None:
    given = schedule(max_steps=steps, warmup_steps=warmup)
    rates = [learning_rate(step, given) for step in range(1, steps + 1)]
    decay = max(1, min(steps // 10, steps - warmup))
    falls = [a - b for a, b in zip(rates[max(0, warmup - 1) :], rates[warmup or 1 :], strict=False)]
    assert all(fall <= 1 / decay + 1e-9 for fall in falls)


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize(
    "name",
    [
        "training.learning_rate",
        "training.optimizer.eps",
        "training.spikes.threshold",
        "model.rope_theta",
        "model.entropy_reg_coeff",
        "supervision.hang_timeout_s",
        "data.cache_size_gib",
        "data.storage_options.timeout",
        "evaluation.depths",
    ],
)
def test_every_number_is_finite(tmp_path: Path, name: str, value: str) -> None:
    text = f"[{value}]" if name.endswith("depths") else value
    with pytest.raises(UserError, match=rf"{name}(\.0)?' is -?(inf|nan); write a finite number"):
        config(tmp_path, f"{name}={text}")


def test_a_section_alone_refuses_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match="finite"):
        schedule(max_steps=10, weight_decay=float("inf"))
