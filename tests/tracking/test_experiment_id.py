"""Two runs never share an id in an experiment tracker, and a run keeps its own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from fusiontree.tracking.experiment_id import FILE, experiment_id


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def test_the_same_name_in_two_places_gives_two_ids(tmp_path: Path) -> None:
    a, b = (folder(tmp_path / name / "seed0") for name in "AB")
    assert experiment_id(a) != experiment_id(b)
    assert experiment_id(a) == experiment_id(a)
    assert re.fullmatch(r"seed0-[0-9a-f]{8}", experiment_id(a))


def test_a_moved_run_keeps_its_id_and_a_copy_gets_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = folder(tmp_path / "run")
    identity = experiment_id(run)
    copy = shutil.copytree(run, tmp_path / "copy")
    other = experiment_id(copy)
    assert other != identity
    assert (experiment_id(run), experiment_id(copy)) == (identity, other)
    run.rename(tmp_path / "moved")
    assert experiment_id(tmp_path / "moved") == identity
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("moved")
    assert experiment_id(Path("moved")) == experiment_id(Path("link")) == identity


def test_a_run_of_an_earlier_version_keeps_the_name_as_id(tmp_path: Path) -> None:
    run = folder(tmp_path / "old run")
    folder(run / "wandb")
    assert experiment_id(run) == "old run"
    run.rename(tmp_path / "elsewhere")
    assert experiment_id(tmp_path / "elsewhere") == "old run"


@pytest.mark.parametrize("content", ["", "[]", '{"id": 1}', "{half"])
def test_a_damaged_file_costs_a_warning(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE).write_text(content)
    identity = experiment_id(tmp_path)
    assert "cannot be read" in caplog.text
    assert json.loads((tmp_path / FILE).read_text())["id"] == identity


def test_characters_that_trackers_refuse_are_replaced(tmp_path: Path) -> None:
    assert re.fullmatch(r"a-b--c-[0-9a-f]{8}", experiment_id(folder(tmp_path / "a b:#c")))
