"""Models whose layers have sizes of their own, as pruned models do, there and back through every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.convert.checkpoints import all_tensors, convert, equal, training_run

MODEL: dict[str, Any] = {
    "layer_pattern": "Fpq",
    "num_heads": 8,
    "num_kv_heads": 4,
    "global_heads": 4,
    "head_dim": 8,
    "letters": {"p": ["mamba2", "attention"], "q": ["mamba2"]},
    "letter_sizes": {
        "p": {"num_heads": 4, "num_kv_heads": 2, "global_heads": 0, "mamba_heads": 4, "mlp_size": 41},
        "q": {"mamba_heads": 6, "mamba_groups": 1},
    },
}
"""Allows tp 2."""


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("megatron", ["--tp", "2"]),
        ("zero", ["--stage", "3", "--dp", "3", "--tp", "2"]),
        ("zero", ["--stage", "1", "--dp", "2", "--tp", "2"]),
        ("hf", []),
        ("safetensors", []),
    ],
)
def test_sizes_of_layers_survive_a_conversion(form: str, options: list[str], tmp_path: Path) -> None:
    training_run(tmp_path / "run", **MODEL)
    there = tmp_path / ("there.safetensors" if form == "safetensors" else "there")
    convert(tmp_path / "run", there, "--to", form, *options)
    convert(there, tmp_path / "again", "--to", "dcp")
    before, after = all_tensors(tmp_path / "run"), all_tensors(tmp_path / "again")
    if form in ("megatron", "zero"):
        assert equal(before, after)
    for name in before:
        if name.startswith("model."):
            assert torch.equal(before[name], after[name]), name
