from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from fusiontree.data.state import DataState, Order, SourceIdentity
from fusiontree.training import run_folder
from fusiontree.training.run_folder import check_run_folder, check_same_data, write_config
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
    [("model", "hidden_size", 128), ("training", "seed", 1)],
)
def test_another_run_is_refused_and_untouched(run_dir: Path, section: str, key: str, value: object) -> None:
    before = (run_dir / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=f"{section}.{key}"):
        check_run_folder(run_dir, changed(section, key, value))
    assert (run_dir / "config.yaml").read_bytes() == before


def test_of_sections_the_settings_that_differ_are_named(run_dir: Path) -> None:
    mixers = {"delta": {"key_dim": 16, "range": [0, 1]}}
    write_config(run_dir, yaml.safe_dump(changed("model", "mixers", mixers)))
    with pytest.raises(UserError, match=r"model\.mixers\.delta\.key_dim: 16 in the folder, 8 now") as refused:
        check_run_folder(run_dir, changed("model", "mixers", {"delta": {**mixers["delta"], "key_dim": 8}}))
    assert "range" not in str(refused.value)
    with pytest.raises(UserError, match=r"model\.mixers: {'delta': .* in the folder, None now"):
        check_run_folder(run_dir, VALUES)


def test_settings_that_came_later_are_those_of_the_run(run_dir: Path) -> None:
    old = VALUES["model"] | {"mamba": {"d_state": 16}}
    write_config(run_dir, yaml.safe_dump(VALUES | {"model": old}))
    now = old | {"branch_mix": "gate", "global_rope": True, "mamba": {"d_state": 16, "dt_min": None}}
    check_run_folder(run_dir, VALUES | {"model": now})
    with pytest.raises(UserError, match=r"run:\n  model\.mamba\.dt_min: None in the folder, 0\.1 now\nset"):
        check_run_folder(run_dir, VALUES | {"model": now | {"mamba": {"d_state": 16, "dt_min": 0.1}}})
    with pytest.raises(UserError, match=r"model\.branch_mix: 'gate' in the folder, 'sum' now"):
        check_run_folder(run_dir, VALUES | {"model": now | {"branch_mix": "sum"}})


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        check_run_folder(tmp_path, VALUES)


def test_an_earlier_config_is_kept(run_dir: Path) -> None:
    write_config(run_dir, "new: 1\n")
    assert (run_dir / "config.before-1.yaml").is_file()


def test_changed_settings_are_returned(run_dir: Path) -> None:
    now = changed("training", "max_steps", 20) | {"data": {"train": "moved", "new": 1}}
    assert write_config(run_dir, yaml.safe_dump(now)) == {
        "data.train": ("shards", "moved"),
        "training.max_steps": (10, 20),
    }


def order(fingerprint: str = "a") -> Order:
    return Order(0, 8, True, 16, (SourceIdentity("anywhere", 1.0, fingerprint, 9),))


def start(run_dir: Path, data: str) -> None:
    (run_dir / "events.jsonl").write_text(json.dumps({"event": "start", "step": 0, "data": data}) + "\n")


def test_a_moved_dataset_is_recognised_before_the_first_checkpoint(run_dir: Path) -> None:
    moved = changed("data", "train", "moved/shards")
    check_same_data(run_dir, VALUES, order("b"))  # the same path, rebuilt: nothing was kept that it could spoil
    with pytest.raises(UserError, match=r"data.train: 'shards' in the folder, 'moved/shards' now"):
        check_same_data(run_dir, moved, order())  # a run of an earlier version: unknown
    start(run_dir, order().fingerprint)
    check_same_data(run_dir, moved, order())
    with pytest.raises(UserError, match=r"data\.train"):
        check_same_data(run_dir, moved, order("b"))


def test_a_moved_dataset_is_compared_with_the_checkpoint(run_dir: Path) -> None:
    for step, content in ((3, json.dumps({"data": DataState().state_dict(order(), [0])})), (5, "{damaged")):
        folder = run_dir / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        (folder / "state.json").write_text(content)
    check_same_data(run_dir, changed("data", "train", "moved/shards"), order())
    with pytest.raises(UserError, match="is another dataset or was rebuilt"):
        check_same_data(run_dir, VALUES, order("b"))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"model: [", b"just text", b"model: 3", b"[" * 1500])
def test_a_damaged_config_costs_a_warning_and_is_kept(
    run_dir: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    run_folder._warn.cache_clear()
    (run_dir / "config.yaml").write_bytes(content)
    check_run_folder(run_dir, VALUES)
    assert "is damaged" in caplog.text
    assert write_config(run_dir, yaml.safe_dump(VALUES)) == {}
    assert (run_dir / "config.before-1.yaml").read_bytes() == content


def test_a_damaged_config_is_replaced_by_that_of_the_newest_checkpoint(run_dir: Path) -> None:
    for step, content in ((3, json.dumps({"config": VALUES})), (5, "{damaged")):
        folder = run_dir / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        (folder / "state.json").write_text(content)
    (run_dir / "config.yaml").write_bytes(b"\xff\xfe")
    check_run_folder(run_dir, VALUES)
    with pytest.raises(UserError, match=r"training.global_batch_size: 2 in the folder, 4 now"):
        check_run_folder(run_dir, changed("training", "global_batch_size", 4))


def test_a_run_of_a_version_without_a_setting_resumes_with_its_default(run_dir: Path) -> None:
    check_run_folder(run_dir, changed("model", "branch_mix", "gate"))
    with pytest.raises(UserError, match=r"model.branch_mix: 'gate' in the folder, 'mean' now"):
        check_run_folder(run_dir, changed("model", "branch_mix", "mean"))
