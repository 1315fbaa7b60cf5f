"""Settings that moved to another section."""

from __future__ import annotations

import logging

import pytest

from fusiontree.config import moved
from fusiontree.config.load import apply_overrides
from fusiontree.utils.errors import UserError
from fusiontree.utils.settings import warn_of_former_name


@pytest.fixture(autouse=True)
def moves(monkeypatch: pytest.MonkeyPatch) -> None:
    warn_of_former_name.cache_clear()
    monkeypatch.setattr(moved, "MOVED", {"training.adam_beta9": "training.optimizer.beta9"})


def test_a_former_name_takes_effect_under_the_present_one_and_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    given = {"training": {"adam_beta9": 0.5, "seed": 1}}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            present = moved.under_present_names(given, "a.yaml")
    assert present == {"training": {"optimizer": {"beta9": 0.5}, "seed": 1}}
    assert given == {"training": {"adam_beta9": 0.5, "seed": 1}}
    assert [record.getMessage() for record in caplog.records] == [
        "the setting 'training.adam_beta9' is now named 'training.optimizer.beta9'"
    ]


@pytest.mark.parametrize("optimizer", [{"beta9": 0.5}, "adamw"], ids=["both", "no section"])
def test_both_names_at_once_are_refused(optimizer: object) -> None:
    with pytest.raises(UserError, match=r"a\.yaml.*former name.*remove 'training\.adam_beta9'"):
        moved.under_present_names({"training": {"adam_beta9": 0.5, "optimizer": optimizer}}, "a.yaml")


def test_an_override_under_the_former_name_replaces_the_value_in_the_file() -> None:
    values = {"training": {"optimizer": {"beta9": 0.5}}}
    assert apply_overrides(values, ["training.adam_beta9=0.25"]) == {"training": {"optimizer": {"beta9": 0.25}}}


@pytest.mark.parametrize("values", [{}, {"training": None}, {"training": [1]}])
def test_values_without_the_section_stay(values: dict[str, object]) -> None:
    assert moved.under_present_names(values, "a.yaml") == values
