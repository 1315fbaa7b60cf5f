"""The table of operations: each operation is timed, forward and backward, by what runs here."""

from __future__ import annotations

import pytest
import torch

from fusiontree.benchmarking.operations import cases, time_operations
from fusiontree.ops.attention import ATTENTION
from tests.helpers import tiny_config


def test_every_operation_is_timed() -> None:
    rows = time_operations(tiny_config(), 32, torch.float32, torch.device("cpu"), repeats=1)
    names = {case.name for case in cases(tiny_config(), 32, torch.float32, torch.device("cpu"))}
    assert {row["operation"] for row in rows} == names
    assert {"scan", "convolution", "attention, local heads", "attention, global heads"} <= names
    assert all(row["forward_ms"] > 0 and row["backward_ms"] > 0 for row in rows)
    assert {row["backend"] for row in rows if row["operation"] == "attention, local heads"} == {"sdpa", "reference"}


def test_a_backend_without_kernels_for_the_sizes_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(ATTENTION.backends["flash4"]), "unavailable", lambda device: None)  # but not in float32
    rows = time_operations(tiny_config(), 32, torch.float32, torch.device("cpu"), repeats=1)
    assert {row["backend"] for row in rows if row["operation"] == "attention, local heads"} == {"sdpa", "reference"}
