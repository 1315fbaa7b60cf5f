"""Paths by one rule in every setting and option: ``~``, ``$NAME``, relative, absolute, URLs and commands."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from fusiontree.cli.program import run_program
from fusiontree.config.load import config_values, dump_config, load_config
from fusiontree.utils.environment import expand_path
from fusiontree.utils.errors import UserError
from tests.config.test_load import BASE


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOT_SET", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("~/runs/x", "{home}/runs/x"),
        ("~", "{home}"),
        ("$SCRATCH/x", "{home}/scratch/x"),
        ("${SCRATCH}x/$SCRATCH", "{home}/scratchx/{home}/scratch"),
        ("runs/x", "runs/x"),
        ("../x", "../x"),
        ("/data/a~b", "/data/a~b"),
        ("s3://bucket$SCRATCH/x", "s3://bucket{home}/scratch/x"),
        ("https://host/~user/data", "https://host/~user/data"),
        ("pipe:cat $SHARDS/{name}", "pipe:cat $SHARDS/{name}"),
        ("cost_$5", "cost_$5"),  # exists
    ],
)
def test_one_rule(home: Path, given: str, expected: str) -> None:
    (home / "cost_$5").mkdir()
    assert expand_path(given) == expected.replace("{home}", str(home))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("$NOT_SET/x", "NOT_SET"),
        ("$EMPTY/x", "EMPTY"),
        ("~nobody-here/x", "home of a"),
        ("", "empty"),
        (" ", "empty"),
    ],
)
def test_what_cannot_be_meant_is_refused(home: Path, given: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        expand_path(given)


def test_every_path_of_the_configuration_follows_it(home: Path) -> None:
    (home / "run.yaml").write_text(BASE)
    (home / "plugin.py").write_text("")
    overrides = ["run_dir=~/run", "data.train=$SCRATCH/d", "data.validation={a: ~/v, b: {path: $SCRATCH/v}}"]
    overrides += ["evaluation.data=~/v", "evaluation.text=[~/t.txt]", "plugins=[~/plugin.py]"]
    overrides += ["logging.tensorboard.folder=$SCRATCH/tb", "logging.trackers=[tensorboard]"]
    config = load_config("~/run.yaml", overrides)
    assert config.run_dir == f"{home}/run"
    assert [d.path for d in config.data.sources] == [f"{home}/scratch/d"]
    assert [d.path for d in config.data.validation_sets.values()] == [f"{home}/v", f"{home}/scratch/v"]
    assert config.evaluation.data == f"{home}/v"
    assert config.evaluation.text == [f"{home}/t.txt"]
    assert config.logging.tensorboard.folder == f"{home}/scratch/tb"
    assert config.data.cache_folder == home / ".cache/fusiontree/shards"
    (home / "again.yaml").write_text(dump_config(config))
    assert config_values(load_config("again.yaml")) == config_values(config)
    with pytest.raises(UserError, match=r"data.train: '\$NOT_SET/d' names the variable NOT_SET"):
        load_config("run.yaml", ["data.train=$NOT_SET/d"])
    with pytest.raises(UserError, match="run_dir: the path is empty"):
        load_config("run.yaml", ["run_dir=''"])


def test_two_spellings_of_one_folder_are_one(home: Path) -> None:
    (home / "run.yaml").write_text(BASE)
    (home / "link").symlink_to("d")
    for spelling in ("./d", "d/", "x/../d", f"{home}/d", "~/d", "link", f"file://{home}/d"):
        with pytest.raises(UserError, match="is trained on"):
            load_config("run.yaml", ["data.train=d", f"data.validation={spelling}"])
        with pytest.raises(UserError, match="twice"):
            load_config("run.yaml", [f"data.train=[{{path: d, weight: 1.0}}, {{path: '{spelling}', weight: 1.0}}]"])
    load_config("run.yaml", ["data.train=s3://a//b", "data.validation=s3://a/b"])  # an object store tells them apart


def test_options_follow_it(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[argparse.Namespace] = []

    def parser() -> argparse.ArgumentParser:
        made = argparse.ArgumentParser()
        made.add_argument("--output", type=Path)
        made.add_argument("files", type=Path, nargs="*")
        return made

    assert run_program(parser, lambda args: bool(seen.append(args)), ["--output=~/x", "$SCRATCH/a", "b"]) == 0
    assert (seen[0].output, seen[0].files) == (home / "x", [home / "scratch/a", Path("b")])
    assert run_program(parser, lambda args: 0, ["--output=$NOT_SET/x"]) == 2
    assert "NOT_SET, which is not set" in capsys.readouterr().err
