"""Errors of products: bf16's below those of FP8, outliers that only scales of rows survive, every linear map listed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from fusiontree.cli.fp8_errors import RECIPES, RESULTS, check_length, main, product_errors, size_problem
from fusiontree.training.config import TrainingConfig
from fusiontree.utils.errors import UserError
from tests.end_to_end.runs import CONFIG, train


def test_errors_by_precision() -> None:
    g = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(*shape, generator=g).bfloat16() for shape in ((128, 64), (32, 64), (128, 32)))
    for its in product_errors("map", x, weight, grad):
        found = its.by_precision
        assert found["bf16"] < 4e-3
        assert 0.02 < found["fp8 tensor e4m3"] < 0.06, "two factors of half a sixteenth at most"
        if its.result == "output":
            assert found["fp8 tensor e5m2"] == found["fp8 tensor e4m3"], "the type of gradients does not matter"
        else:
            assert 0.03 < found["fp8 tensor e5m2"] < 0.1, "e5m2 has one bit less"
        assert its.outlier < 2


def test_rows_of_small_values_survive_by_scales_of_rows() -> None:
    g = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(*shape, generator=g) for shape in ((128, 64), (32, 64), (128, 32)))
    x[::2] *= 2.0**-18
    x[:, 3] *= 2.0**12
    errors = product_errors("map", x.bfloat16()[::2], weight.bfloat16(), grad.bfloat16()[::2])[0]
    assert errors.outlier > 7.9
    mixed = product_errors("map", x.bfloat16(), weight.bfloat16(), grad.bfloat16())[0].by_precision
    assert mixed["fp8 row e4m3"] < 0.06 and mixed["fp8 tensor e4m3"] < 0.06, "the outlier decides the norm"
    x[:, 3] = 0.0
    x[1::2] = 2.0**12
    grad[1::2] = 0.0  # the weight gradient sees the small rows alone
    by_result = product_errors("map", x.bfloat16(), weight.bfloat16(), grad.bfloat16())
    assert by_result[2].by_precision["fp8 tensor e4m3"] > 0.5, "flushed to zero"


def test_the_program_lists_every_linear_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = {"path": "synthetic", "type": "synthetic", "weight": 1, "options": {"vocab_size": 264}}
    config = tmp_path / "config.yaml"
    training = {**CONFIG["training"], "validation": {"interval": 0}}
    config.write_text(yaml.safe_dump({**CONFIG, "run_dir": "x", "training": training, "data": {"train": [source]}}))
    output = tmp_path / "errors.json"
    assert main(["--config", str(config), "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    errors = json.loads(output.read_text())
    assert len(errors) == 2 * len(RESULTS) * 14, "two layers of 14 linear maps"
    assert {"bf16", *RECIPES} == set(errors[0]["by_precision"])
    for line in ("mamba.in_proj (mixer_in), output", "gate.down (gate), weight gradient", "out_proj (out_proj), input"):
        assert line in shown
    # The gate's last weights are zero at first, and its products exact.
    nonzero = [its for its in errors if its["by_precision"]["bf16"]]
    assert nonzero and all(its["by_precision"]["bf16"] < its["by_precision"]["fp8 row e4m3"] < 0.2 for its in nonzero)


def run_of(tmp_path: Path) -> Path:
    """Train a small model for a step and return its run folder."""
    source = {"path": "synthetic", "type": "synthetic", "weight": 1, "options": {"vocab_size": 264}}
    training = {**CONFIG["training"], "validation": {"interval": 0}, "max_steps": 1, "warmup_steps": 0}
    config = {**CONFIG, "run_dir": str(tmp_path / "run"), "training": training, "data": {"train": [source]}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    trained = train(tmp_path / "config.yaml")
    assert trained.returncode == 0, trained.stderr
    return tmp_path / "run"


def test_a_run_folder_says_which_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path)
    outputs = [tmp_path / "alone.json", tmp_path / "both.json"]
    assert main(["--checkpoint", str(run), "--output", str(outputs[0])]) == 0
    config = ["--config", str(tmp_path / "config.yaml")]
    assert main([*config, "--checkpoint", str(run), "--output", str(outputs[1])]) == 0
    assert outputs[0].read_text() == outputs[1].read_text()
    capsys.readouterr()
    assert main(["--checkpoint", str(run), "training.seed=x"]) == 2
    assert "step-00000001': 'training.seed' is 'x'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "give --config FILE, --checkpoint RUN, or both"),
        (["--checkpoint", "nowhere"], "checkpoint 'nowhere' does not exist"),
        (["--config", "x", "--output", "no/where.json"], "no' does not exist; create it"),
    ],
)
def test_what_the_program_refuses(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert words in capsys.readouterr().err


def test_sizes_that_gpus_refuse() -> None:
    cuda = torch.device("cuda")
    assert size_problem("map", 32, 48, cuda) is None and size_problem("map", 8, 32, torch.device("cpu")) is None
    assert "map multiplies by a matrix of 8 x 32" in (size_problem("map", 8, 32, cuda) or "")
    assert "matrix of 32 x 8" in (size_problem("map", 32, 8, cuda) or "")
    training = {"seq_len": 100, "max_steps": 1, "global_batch_size": 1}
    check_length(TrainingConfig(**training), torch.device("cpu"))
    with pytest.raises(UserError, match=r"training.seq_len is 100; .*training.seq_len=112"):
        check_length(TrainingConfig(**training), cuda)
    with pytest.raises(UserError, match=r"stage 0 of training\.curriculum is 24"):
        check_length(TrainingConfig(**{**training, "seq_len": 96, "curriculum": [[24, 1]]}), cuda)
    check_length(TrainingConfig(**{**training, "seq_len": 96}), cuda)
