from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fusiontree.training.run_folder import check_run_folder, write_config
from fusiontree.utils.errors import UserError

VALUES = {
    "model": {"hidden_size": 64, "kernels": {"ssd": "auto"}},
    "training": {"seed": 0, "seq_len": 8, "global_batch_size": 2, "max_steps": 10},
    "data": {"train": "shards", "num_workers": 0},
}


def changed(section: str, key: str, value: object) -> dict:
    return VALUES | {section: VALUES[section] | {key: value}}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    write_config(tmp_path / "run", yaml.safe_dump(VALUES))
    return tmp_path / "run"


def test_new_and_same_folders_are_fine(run_dir: Path) -> None:
    check_run_folder(run_dir, VALUES)
    check_run_folder(run_dir.with_name("new"), VALUES)


def test_speed_length_and_kernels_may_change(run_dir: Path) -> None:
    check_run_folder(run_dir, changed("training", "max_steps", 20))
    check_run_folder(run_dir, changed("data", "num_workers", 4))
    check_run_folder(run_dir, changed("model", "kernels", {"ssd": "reference"}))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("model", "hidden_size", 128), ("training", "seed", 1), ("data", "train", "elsewhere")],
)
def test_another_run_is_refused_and_untouched(run_dir: Path, section: str, key: str, value: object) -> None:
    before = (run_dir / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=f"{section}.{key}"):
        check_run_folder(run_dir, changed(section, key, value))
    assert (run_dir / "config.yaml").read_bytes() == before


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        check_run_folder(tmp_path, VALUES)


def test_an_earlier_config_is_kept(run_dir: Path) -> None:
    write_config(run_dir, "new: 1\n")
    assert (run_dir / "config.before-1.yaml").is_file()
