"""Names, retention and manifests of checkpoint folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusiontree.checkpoint.config import CheckpointConfig
from fusiontree.checkpoint.folders import MANIFEST, complete_checkpoints, remove_old, remove_partial
from fusiontree.checkpoint.manifest import CheckpointDamage, file_entries, verify, write_manifest


def make(checkpoints: Path, step: int) -> Path:
    folder = checkpoints / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(range(200)))
    write_manifest(folder, file_entries([folder / "weights"], folder))
    return folder


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
    remove_old(tmp_path, CheckpointConfig(keep_last=2, keep_every=30))
    assert [f.name for f in complete_checkpoints(tmp_path)] == [f"step-000000{s}" for s in (30, 50, 60)]
    remove_old(tmp_path, CheckpointConfig(keep_last=0))
    assert len(complete_checkpoints(tmp_path)) == 3


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
