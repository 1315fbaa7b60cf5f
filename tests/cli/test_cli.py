"""The console command and what all programs do alike."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fusiontree.cli import VERBS, main
from fusiontree.cli.convert_checkpoint import main as convert
from fusiontree.config.load import load_config
from fusiontree.config.packaged import find_file, packaged_names
from fusiontree.train import main as train
from fusiontree.utils.errors import UserError
from tests.end_to_end.runs import ROOT, environment


def test_help_lists_every_verb_and_those_of_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in VERBS)
    assert main(["data"]) == 0
    assert "train" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "no verb 'trian'; did you mean 'train'?"),
        (["data", "biuld", "--input", "x"], "no verb 'data biuld'; did you mean 'data build'?"),
        (["--config", "x"], "no verb '--config'"),
    ],
)
def test_an_unknown_verb_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("name", VERBS)
def test_each_verb_answers_help_under_its_own_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    program = sys.argv[0]
    with pytest.raises(SystemExit) as ended:
        main([*name.split(), "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: fusiontree {name} [")
    assert sys.argv[0] == program


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_overrides_may_stand_between_options(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    last = {"train": "--print-config", "plan": "--gpus=2"}[verb]
    words = [verb, "--config", "quickstart", "training.seed=7", last, "model.num_layers=nine"]
    assert main(words) == 2
    assert "model.num_layers" in capsys.readouterr().err


def test_overrides_on_both_sides_of_an_option_count(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(["--config", "quickstart", "training.seed=7", "--print-config", "model.num_layers=9"]) == 0
    text = capsys.readouterr().out
    assert "seed: 7" in text and "num_layers: 9" in text


def test_packaged_files_are_found_by_name_and_a_file_of_that_name_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"quickstart", "pretrain_v1", "bench/hybrid_1b_8k"} <= set(packaged_names())
    assert packaged_names("maps") == ["llama", "mamba2", "qwen3_next"]
    assert find_file(Path("llama"), "maps") == ROOT / "configs" / "maps" / "llama.yaml"
    assert load_config("quickstart").run_dir == "runs/quickstart"
    (tmp_path / "quickstart").write_text("run_dir: mine")
    assert find_file(Path("quickstart")) == Path("quickstart")
    with pytest.raises(UserError, match=r"'quikstart' does not exist; did you mean 'quickstart'\?; packaged names are"):
        load_config("quikstart")


def test_a_wrong_map_names_those_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(tmp_path), str(tmp_path / "run"), "--to", "dcp", "--config", "quickstart", "--map"]
    assert convert([*words, "lama"]) == 2
    assert "map 'lama' does not exist; did you mean 'llama'?; packaged names are llama, mamba2, qwen3_next" in (
        capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy and unpacked as pip does."""
    folder = tmp_path_factory.mktemp("install")
    for name in ("configs", "fusiontree"):
        shutil.copytree(ROOT / name, folder / "copy" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "copy" / name)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--quiet",
        "--no-deps",
        "--no-compile",
    ]
    command = [*pip, "--no-build-isolation", "--no-index", "--target", str(folder / "target"), str(folder / "copy")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "target"


def test_an_installation_holds_commands_configs_and_maps(installed: Path) -> None:
    package = installed / "fusiontree"
    for name in ("configs/quickstart.yaml", "configs/maps/llama.yaml", "configs/bench/hybrid_1b_8k.yaml", "py.typed"):
        assert (package / name).is_file(), name
    assert (package / "cli" / "build_shards.py").is_file()
    (points,) = installed.glob("fusiontree-*.dist-info/entry_points.txt")
    assert "fusiontree = fusiontree.cli:main" in points.read_text()


def test_an_installation_works_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    env = environment() | {"PYTHONPATH": str(installed)}

    def call(*words: str) -> str:
        command = [sys.executable, str(installed / "bin" / "fusiontree"), *words]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "quickstart" in call("--help")
    assert "run_dir: runs/quickstart" in call("train", "--config", "quickstart", "--print-config")
    assert "usage: fusiontree quickstart" in call("quickstart", "--help")
    assert not list(tmp_path.iterdir())
