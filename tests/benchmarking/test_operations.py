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


def test_the_recurrence_of_gated_delta_net_is_timed_if_the_model_has_it() -> None:
    sizes = {"key_dim": 4, "value_dim": 8}
    config = tiny_config(letters={"D": ["gated_delta_net"]}, mixers={"gated_delta_net": sizes})
    given = (torch.float32, torch.device("cpu"))
    (case,) = (case for case in cases(config, 32, *given) if case.name == "gated delta rule")
    assert case.flops == 7 * 32 * 8 * 4 * 8
    rows = [row for row in time_operations(config, 32, *given, repeats=1) if row["operation"] == case.name]
    assert {row["backend"] for row in rows} == {"chunked", "reference"}
    assert "gated delta rule" not in {case.name for case in cases(tiny_config(), 32, *given)}
