"""An optimizer from a user's file: trained under every kind of engine, saved, resumed elsewhere, converted, planned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fusiontree.checkpoint.reader import CheckpointReader
from fusiontree.config.load import load_config
from fusiontree.config.plugins import load_plugins
from fusiontree.optim.build import build_optimizer, fill_states, new_states, parameter_groups, scaled_step
from fusiontree.optim.config import OPTIMIZERS
from fusiontree.planning.cost_model import Hardware, estimate
from fusiontree.train import main as train_main
from fusiontree.utils.errors import UserError
from tests.convert.checkpoints import all_tensors, convert, equal
from tests.end_to_end.runs import ROOT, metrics
from tests.parallel.launch import Job, Table
from tests.parallel.table import MODEL, TRAINING

pytestmark = [pytest.mark.xdist_group("extend_optimizer"), pytest.mark.timeout(900)]

LION = str(ROOT / "docs" / "extend" / "lion.py")
STEPS, STOP = 10, 4
CELLS = {
    "ddp": ["parallel.engine=ddp"],
    "fsdp2": ["parallel.engine=fsdp2"],
    "fsdp2-tp2": ["parallel.engine=fsdp2", "parallel.tp=2"],
    "zero1": ["parallel.engine=zero1"],
    "zero3": ["parallel.engine=zero3"],
}


@pytest.fixture(scope="module", autouse=True)
def plugin() -> None:
    load_plugins([LION])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two ranks: one per cell, and one that moves from fsdp2 with tp to zero3 and to ddp."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("lion")
    training = TRAINING | {
        "max_steps": STEPS,
        "validation": {"interval": 0},
        "micro_batch_size": 2,
        "weight_decay": 0.5,
    }
    training |= {"optimizer": {"name": "lion", "beta2": 0.98}, "learning_rate": 5e-4}
    training |= {"weight_decay": 0.5, "max_grad_norm": 0.5}
    checkpoint = {"save_interval": STOP, "keep_last": 0}
    sections = {"plugins": [LION], "model": MODEL, "training": training, "checkpoint": checkpoint}
    jobs: list[Job] = [(str(folder / name), overrides, None) for name, overrides in CELLS.items()]
    for cell, stop in (("fsdp2-tp2", STOP), ("zero3", STOP + 3), ("ddp", STEPS)):
        jobs.append((str(folder / "moved"), [*CELLS[cell], f"training.exit_at_step={stop}"], None))
    Table(folder, sections).train(2, jobs)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(name for name in CELLS if name != "ddp"), "moved"])
def test_losses_and_norms_are_equal_under_every_engine_and_after_moves(runs: Path, name: str) -> None:
    for key in ("loss", "grad_norm"):
        found, expected = metrics(runs / name, key), metrics(runs / "ddp", key)
        assert len(found) == STEPS and found == pytest.approx(expected, rel=1e-5)
    assert metrics(runs / "ddp", "loss")[-1] < metrics(runs / "ddp", "loss")[0] - 0.05


def test_a_checkpoint_holds_the_states_of_the_specification(runs: Path) -> None:
    reader = CheckpointReader(runs / "zero3" / "checkpoints" / f"step-{STEPS:08d}")
    kinds = {".".join(name.split(".")[:2]) for name in reader.tensors if not name.startswith("model.")}
    assert kinds == {"optimizer.exp_avg"}
    assert all(float(reader.read(name).abs().sum()) > 0 for name in reader.tensors if "mlp" in name)


@pytest.mark.parametrize("form", [("zero", "--stage", 3, "--dp", 2), ("zero", "--stage", 1), ("megatron",)], ids=str)
def test_converters_carry_the_states(runs: Path, tmp_path: Path, form: tuple[Any, ...]) -> None:
    step = runs / "fsdp2" / "checkpoints" / f"step-{STEPS:08d}"
    convert(step, tmp_path / "other", "--to", *form)
    convert(tmp_path / "other", tmp_path / "again", "--to", "dcp")
    saved = CheckpointReader(step)
    assert equal(all_tensors(tmp_path / "again"), {name: saved.read(name) for name in saved.tensors})


def test_a_resume_with_another_optimizer_is_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--config", str(runs / "config.yaml"), f"run_dir={runs / 'ddp'}", "training.optimizer={name: adamw}"]
    assert train_main([*command, "parallel.engine=fsdp2", f"training.max_steps={STEPS + 1}"]) == 2
    error = capsys.readouterr().err
    assert "training.optimizer.name=lion" in error and "checkpoint.init_from" in error


def test_the_planner_counts_its_bytes() -> None:
    states = {}
    for name in ("adamw", "lion"):
        config = load_config(ROOT / "configs/bench/hybrid_7b_32k.yaml", [f"training.optimizer.name={name}"])
        states[name] = estimate(config.model, config.parallel, config.training, 8, Hardware()).states_gib
    assert states["lion"] == pytest.approx(states["adamw"] * 12 / 16)


def test_its_settings_are_validated_by_its_own_section() -> None:
    with pytest.raises(UserError, match=r"unknown key 'eps' of optimizer lion; known keys: name, beta1, beta2"):
        load_config(ROOT / "configs/quickstart.yaml", ["training.optimizer={name: lion, eps: 1e-8}"])
    with pytest.raises(UserError, match=r"'training\.optimizer\.beta2' is 1\.0: input should be less than 1"):
        load_config(ROOT / "configs/quickstart.yaml", ["training.optimizer={name: lion, beta2: 1.0}"])


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_a_step_divides_the_gradient_and_skips_where_it_is_not_finite(name: str) -> None:
    spec = OPTIMIZERS.get(name)
    settings = spec.settings.model_validate({"name": name})
    ends = []
    for factor in (1.0, 4.0):
        values = torch.linspace(-1, 1, 8)
        optimizer = build_optimizer(settings, parameter_groups([values], [], 0.1))
        fill_states(optimizer, values, new_states(spec, values))
        optimizer.param_groups[0]["lr"] = 0.1
        for norm in (1.0, float("nan"), 2.0):
            values.grad = torch.arange(8.0) * norm * factor - 3 * factor
            scaled_step(optimizer, spec, torch.tensor(factor), torch.tensor(norm))
        assert optimizer.state[values]["step"] == 2
        ends.append(values)
    assert ends[0].isfinite().all() and not torch.equal(ends[0], torch.linspace(-1, 1, 8))
    torch.testing.assert_close(*ends)


def test_states_have_the_dtype_of_the_specification() -> None:
    spec = replace(OPTIMIZERS.get("lion"), states={"momentum": "bfloat16"})
    assert new_states(spec, torch.zeros(3))["momentum"].dtype == torch.bfloat16
    assert spec.bytes_per_parameter == 2
