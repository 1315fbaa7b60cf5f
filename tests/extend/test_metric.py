"""A layer metric from a file outside the product: docs/extend/branch_rms.py, from the block to metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fusiontree.config.load import load_config
from fusiontree.config.plugins import load_plugins
from fusiontree.train import main, train
from fusiontree.utils.errors import UserError
from fusiontree.utils.layer_metrics import LAYER_METRICS, LayerMetric
from tests.end_to_end import runs
from tests.helpers import tiny_model

pytestmark = pytest.mark.xdist_group("training")
PLUGIN = str(runs.ROOT / "docs" / "extend" / "branch_rms.py")
SETTINGS = [
    f"plugins=[{PLUGIN}]",
    "logging={log_interval: 2, layer_metrics: [branch_rms]}",
    "training.max_steps=3",
    "training.warmup_steps=0",
    "training.global_batch_size=7",  # not divisible: a row without weight fills up the batch
    "training.validation.interval=0",
    "checkpoint.save_interval=0",
    "model.layer_pattern=FMA",
    "model.num_layers=3",
    "model.mamba.n_groups=2",
    "model.mamba.norm_groups=2",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.build_data(tmp_path_factory.mktemp("metric"))


def logged(run_dir: Path) -> dict[int, dict[str, list[float]]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["branch_rms"] for record in records}


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("alone")
    done = runs.train(runs.write_config(folder, data), *SETTINGS)
    assert done.returncode == 0, done.stderr
    return logged(folder / "run")


def test_the_sums_are_those_of_the_branches_outputs() -> None:
    load_plugins([PLUGIN])
    model = tiny_model(layer_pattern="FMA")
    outputs: dict[tuple[int, str], torch.Tensor] = {}
    for layer, block in enumerate(model.layers):
        for name in ("mamba", "attention"):
            if hasattr(block, name):
                note = lambda m, a, out, key=(layer, name): outputs.__setitem__(key, out)  # noqa: E731
                getattr(block, name).register_forward_hook(note)
    ids_BS = torch.randint(0, 64, (3, 6), generator=torch.Generator().manual_seed(1))
    mask_BS = torch.tensor([[True] * 6, [False] * 2 + [True] * 4, [True] + [False] * 5])
    dropped_LB2 = torch.zeros(3, 3, 2)  # the metric sees branches before dropout
    with torch.no_grad():
        assert model(ids_BS).layer_sums.sums_LB.keys() == {"gate", "entropy", "square"}
        sums = model(
            ids_BS, padding_mask_BS=mask_BS, branch_scale_LB2=dropped_LB2, layer_metrics=("branch_rms",)
        ).layer_sums.sums_LB
    assert set(outputs) == {(0, "mamba"), (0, "attention"), (1, "mamba"), (2, "attention")}
    for name in ("mamba", "attention"):
        for layer in range(3):
            output_BSC = outputs.get((layer, name), torch.zeros(3, 6, 32))
            expected_B = (output_BSC.square() * mask_BS[..., None]).sum((1, 2))
            torch.testing.assert_close(sums[f"branch_rms.{name}"][layer], expected_B)


def test_one_process_logs_a_value_per_layer_on_logged_steps(alone: dict[int, dict[str, list[float]]]) -> None:
    assert list(alone) == [2, 3]  # every second step and the last
    for values in alone.values():
        assert [value > 0 for value in values["mamba"]] == [True, True, False]
        assert [value > 0 for value in values["attention"]] == [True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.tp=2"],
        ["parallel.cp=2", "training.activation_checkpointing=full"],
        ["parallel.engine=zero3", "training.micro_batch_size=4"],
    ],
    ids=["tp 2", "cp 2", "dp 2"],
)
def test_every_layout_logs_the_same_values(
    tmp_path: Path, data: Path, alone: dict[int, dict[str, list[float]]], layout: list[str]
) -> None:
    done = runs.train(runs.write_config(tmp_path, data), *SETTINGS, *layout, processes=2)
    assert done.returncode == 0, done.stderr
    found = logged(tmp_path / "run")
    assert found.keys() == alone.keys()
    for step, values in alone.items():
        for name, value_L in values.items():
            assert found[step][name] == pytest.approx(value_L, rel=1e-5), (step, name)


def test_steps_that_are_not_logged_compute_nothing(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LAYER_METRICS, "_parts", {})
    calls: list[list[str]] = []

    def row_sums(branches_BSC: dict[str, Any], counted_BS: Any) -> dict[str, Any]:
        calls.append(list(branches_BSC))
        assert not any(output.requires_grad for output in branches_BSC.values())
        return {"rows": next(iter(branches_BSC.values())).sum((1, 2)) * 0 + 1}

    LAYER_METRICS.register("calls", LayerMetric(row_sums, lambda means: means))
    settings = [*SETTINGS[2:], "logging={log_interval: 2, layer_metrics: [calls]}"]
    assert train(load_config(runs.write_config(tmp_path, data), settings)) == 0
    passes = 4  # of two rows, in each of the logged steps 2 and 3
    assert calls == 2 * passes * [["mamba", "attention"], ["mamba"], ["attention"]]


def test_an_unknown_metric_is_refused_before_the_run(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(runs.write_config(tmp_path, data))
    assert main(["--config", config, "--check", "logging.layer_metrics=[branch_std]"]) == 2
    assert "unknown layer metric 'branch_std'" in capsys.readouterr().err
    with pytest.raises(UserError, match="layer metric 'calls' is registered twice"):
        for _ in range(2):
            LAYER_METRICS.register("calls", LayerMetric(lambda branches, counted: {}, lambda means: means))
