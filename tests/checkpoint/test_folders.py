"""Names, retention and manifests of checkpoint folders."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fusiontree.checkpoint.config import CheckpointConfig
from fusiontree.checkpoint.folders import MANIFEST, STATE, complete_checkpoints, remove_partial, set_aside
from fusiontree.checkpoint.manifest import CheckpointDamage, file_entries, write_manifest
from fusiontree.checkpoint.retention import remove_old
from fusiontree.checkpoint.verify import verify


def make(checkpoints: Path, step: int, validation_loss: float | None = None) -> Path:
    folder = checkpoints / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(range(200)))
    (folder / STATE).write_text(json.dumps({} if validation_loss is None else {"validation_loss": validation_loss}))
    write_manifest(folder, file_entries([folder / "weights", folder / STATE], folder))
    return folder


def steps(checkpoints: Path) -> list[int]:
    return [int(f.name[-8:]) for f in complete_checkpoints(checkpoints)]


def test_only_whole_folders_count(tmp_path: Path) -> None:
    make(tmp_path, 5), make(tmp_path, 20)
    (tmp_path / "step-00000030").mkdir()
    (tmp_path / ".partial-step-00000040").mkdir()
    (tmp_path / "notes").mkdir()
    assert [f.name for f in complete_checkpoints(tmp_path)] == ["step-00000005", "step-00000020"]
    assert [f.name for f in remove_partial(tmp_path)] == [".partial-step-00000040"]


def test_retention(tmp_path: Path) -> None:
    for step in range(10, 70, 10):
        make(tmp_path, step)
    remove_old(tmp_path, CheckpointConfig(keep_last=2, keep_every=30), newest=60)
    assert steps(tmp_path) == [30, 50, 60]
    remove_old(tmp_path, CheckpointConfig(keep_last=0), newest=60)
    assert steps(tmp_path) == [30, 50, 60]


@pytest.mark.parametrize("later", [1, 2, 3])
@pytest.mark.parametrize("keep_last", [1, 2])
def test_checkpoints_of_later_steps_are_not_counted(tmp_path: Path, keep_last: int, later: int) -> None:
    """The run has passed over them: they displace neither the checkpoint just written nor the one before."""
    for step in (10, 11, *range(17, 17 + later)):
        make(tmp_path, step)
    remove_old(tmp_path, CheckpointConfig(keep_last=keep_last), newest=11)
    assert steps(tmp_path) == [10, 11][-keep_last:] + list(range(17, 17 + later))


def test_a_truncated_checkpoint_is_not_counted(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        make(tmp_path, step)
    (tmp_path / "step-00000030" / "weights").write_bytes(b"short")
    (tmp_path / "step-00000020" / MANIFEST).write_text("{")
    remove_old(tmp_path, CheckpointConfig(keep_last=2), newest=40)
    assert steps(tmp_path) == [10, 20, 30, 40]


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        pytest.param([1.0, math.nan, 0.5, None], [3, 4], id="nan is no loss"),
        pytest.param([0.5, math.inf, -math.inf, None], [1, 4], id="infinities are no losses"),
        pytest.param([0.5, 0.5, 0.7, None], [1, 4], id="the earlier of equals"),
        pytest.param([None, None, None, 2.0], [4], id="one loss"),
    ],
)
def test_the_lowest_finite_validation_loss_is_kept(tmp_path: Path, losses: list[float | None], kept: list[int]) -> None:
    for step, loss in enumerate(losses, 1):
        make(tmp_path, step, loss)
    remove_old(tmp_path, CheckpointConfig(keep_last=1, keep_best=1), newest=4)
    assert steps(tmp_path) == kept


def test_damaged_checkpoints_are_set_aside_without_replacing_one_another(tmp_path: Path) -> None:
    for number in ("", "-2", "-3"):
        assert set_aside(make(tmp_path, 7)).name == f"damaged-step-00000007{number}"
    assert steps(tmp_path) == []
    assert len(list(tmp_path.glob("*/weights"))) == 3


@pytest.mark.parametrize("damage", ["flip", "truncate", "hole", "remove", "manifest"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    folder = make(tmp_path, 1)
    verify(folder)
    file = folder / "weights"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[100] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(data[:-1])
    elif damage == "hole":
        file.write_bytes(data[:50] + bytes(100) + data[150:])
    elif damage == "remove":
        file.unlink()
    else:
        (folder / MANIFEST).write_text(json.dumps({"files": 3})[:-4])
    with pytest.raises(CheckpointDamage, match=MANIFEST if damage == "manifest" else "weights"):
        verify(folder)
