"""Errors of products: bf16's below those of FP8, outliers that only scales of rows survive, every linear map listed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from fusiontree.cli.fp8_errors import RECIPES, RESULTS, main, product_errors
from tests.end_to_end.runs import CONFIG


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
