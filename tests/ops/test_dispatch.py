from __future__ import annotations

import logging

import pytest
import torch

from fusiontree.ops import dispatch
from fusiontree.ops.dispatch import Backend, Operation, anywhere, chosen_backends
from fusiontree.utils.errors import UserError


def operation() -> Operation:
    fast = Backend("fast", lambda: len, lambda device: "its package is not installed")
    return Operation("thing", [fast, Backend("reference", lambda: sum, anywhere)])


def test_auto_takes_the_first_that_runs_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="fusiontree.ops.dispatch")
    op = operation()
    assert op.choose("auto", "cpu") is sum
    assert op.choose("auto", "cpu") is sum
    assert [r.getMessage() for r in caplog.records] == ["thing on cpu: reference"]


def test_operations_of_one_setting_are_told_apart(caplog):
    caplog.set_level(logging.INFO, logger="fusiontree.ops.dispatch")
    other = Operation("thing", [Backend("reference", lambda: sum, anywhere)], shown="other thing")
    other.choose("auto", "cpu")
    assert [r.getMessage() for r in caplog.records] == ["other thing on cpu: reference"]
    with pytest.raises(UserError, match=r"kernels\.thing=x"):
        other.choose("x", "cpu")


def test_a_named_backend_is_never_replaced() -> None:
    with pytest.raises(
        UserError, match=r"model\.kernels\.thing=fast cannot .*: its package is not installed; use auto or one"
    ):
        operation().choose("fast", "cpu")
    with pytest.raises(UserError, match="did you mean 'fast'"):
        operation().choose("fats", "cpu")


def test_no_backend_at_all_lists_the_reasons() -> None:
    only = Operation("thing", [Backend("fast", lambda: len, lambda device: f"needs more than {device.type}")])
    with pytest.raises(UserError, match="needs more than cpu"):
        only.choose("auto", torch.device("cpu").type)


def test_the_backends_in_use_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_chosen", {})
    assert chosen_backends() == "none yet"
    for name, wanted in (("a", "auto"), ("b", "reference"), ("c", "other")):
        backends = [Backend("reference", lambda: sum, anywhere), Backend("other", lambda: len, anywhere)]
        Operation(name, backends).choose(wanted, "cpu")
    assert chosen_backends() == "reference for 2 operations, c: other"
