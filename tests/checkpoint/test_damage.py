"""Damaged and hostile checkpoints: found, named, passed over, and never executed."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from fusiontree.checkpoint.config import CheckpointConfig
from fusiontree.checkpoint.load import check_model, load_checkpoint, load_newest
from fusiontree.checkpoint.manifest import CheckpointDamage, file_entries, write_manifest
from fusiontree.checkpoint.metadata import read_metadata
from fusiontree.checkpoint.saver import Saver
from fusiontree.checkpoint.verify import verify
from fusiontree.utils.errors import UserError

FILES = ["__0_0.distcp", ".metadata", "tensors.index", "state.json", "tokenizer.json", "manifest.json"]


def state(value: float) -> dict[str, Tensor]:
    return {"model.a": torch.full((40, 5), value), "model.b": torch.full((64,), value)}


def blank() -> dict[str, Tensor]:
    return {name: torch.zeros_like(t) for name, t in state(0).items()}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    extra = tmp_path / "tokenizer.json"
    extra.write_text(json.dumps({"vocabulary": list(range(100))}))
    saver = Saver(tmp_path / "checkpoints", CheckpointConfig())
    for step in (1, 2):
        saver.save(step, state(step), {"config": {"model": {"hidden_size": 8}}}, [extra], wait=True)
    assert [r.error for r in saver.poll()] == [None, None]
    return tmp_path / "checkpoints"


def damage(file: Path, kind: str) -> None:
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    if kind == "flip":
        data[middle] ^= 4
    elif kind == "truncate":
        del data[-7:]
    elif kind == "empty":
        data.clear()
    else:
        data[middle : middle + 40] = bytes(40)
    file.write_bytes(data)


@pytest.mark.parametrize("kind", ["flip", "truncate", "empty", "hole", "remove"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_older_checkpoint_taken(checkpoints: Path, name: str, kind: str) -> None:
    file = checkpoints / "step-00000002" / name
    if kind == "remove":
        file.unlink()
    else:
        damage(file, kind)
    messages: list[str] = []
    tensors = blank()
    found = load_newest(checkpoints, tensors, on_damage=messages.append)
    assert found is not None and found[1]["step"] == 1
    assert all(torch.equal(tensors[n], t) for n, t in state(1).items())
    if (name, kind) != ("manifest.json", "remove"):  # then it is no checkpoint
        assert len(messages) == 1 and name in messages[0]
        with pytest.raises(CheckpointDamage, match=name):
            verify(checkpoints / "step-00000002")


def test_every_single_byte_of_the_tensors_matters(checkpoints: Path) -> None:
    file = checkpoints / "step-00000002" / "__0_0.distcp"
    data = file.read_bytes()
    for at in range(0, len(data), 97):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(CheckpointDamage, match=r"__0_0\.distcp"):
            load_checkpoint(file.parent, blank())
    file.write_bytes(data)
    load_checkpoint(file.parent, blank())


def test_none_left(checkpoints: Path) -> None:
    for folder in checkpoints.iterdir():
        damage(folder / "__0_0.distcp", "flip")
    with pytest.raises(CheckpointDamage, match="all 2 checkpoints"):
        load_newest(checkpoints, blank())
    assert load_newest(checkpoints / "nowhere", blank()) is None


class Runs:
    """Its pickle runs a command."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> object:
        return os.system, (f"touch {self.sentinel}",)


def rewrite_manifest(folder: Path) -> None:
    """Make the hashes fit, as whoever plants a pickle would."""
    (folder / "manifest.json").unlink()
    write_manifest(folder, file_entries(list(folder.iterdir()), folder))


def test_metadata_that_would_run_a_command(checkpoints: Path, tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    folder = checkpoints / "step-00000002"
    (folder / ".metadata").write_bytes(pickle.dumps(Runs(sentinel)))
    rewrite_manifest(folder)
    with pytest.raises(CheckpointDamage, match=r"names posix\.system, which is not allowed and was not run"):
        load_checkpoint(folder, blank())
    with pytest.raises(CheckpointDamage):
        read_metadata(folder)
    assert not sentinel.exists()
    pickle.loads((folder / ".metadata").read_bytes())  # the trap is a real one
    assert sentinel.exists()


@pytest.mark.parametrize("inside", ["builtins.eval", "torch.load", "torch.serialization.load", "torch.hub.load"])
def test_names_that_are_near_the_allowed_ones(checkpoints: Path, inside: str) -> None:
    module, _, name = inside.rpartition(".")
    folder = checkpoints / "step-00000002"
    (folder / ".metadata").write_bytes(f"c{module}\n{name}\n(S'x'\ntR.".encode())
    rewrite_manifest(folder)
    with pytest.raises(CheckpointDamage, match=name):
        load_checkpoint(folder, blank())


def test_tensor_files_that_would_run_a_command(checkpoints: Path, tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    folder = checkpoints / "step-00000003"
    dcp.save(state(3), checkpoint_id=folder, no_dist=True)
    (folder / "state.json").write_text("{}")
    file = next(folder.glob("*.distcp"))
    torch.save(Runs(sentinel), file)
    file.write_bytes(file.read_bytes().ljust(20_000, b"\0"))
    rewrite = list(folder.iterdir())
    write_manifest(folder, file_entries(rewrite, folder))
    with pytest.raises(CheckpointDamage, match=file.name):
        load_checkpoint(folder, blank())
    assert not sentinel.exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd"])
def test_names_that_lead_outside(checkpoints: Path, name: str) -> None:
    folder = checkpoints / "step-00000002"
    write_manifest(folder, {name: {"bytes": 1, "sha256": "0"}})
    with pytest.raises(CheckpointDamage, match="outside the checkpoint"):
        load_checkpoint(folder, blank())


def test_another_model_is_named_by_its_fields(checkpoints: Path) -> None:
    def check(folder: Path, saved: dict) -> None:
        check_model(folder, saved, {"hidden_size": 16, "num_heads": 2, "kernels": {"ssd": "auto"}})

    with pytest.raises(UserError) as caught:
        load_newest(checkpoints, blank(), check=check)
    assert "model.hidden_size: 8 in the checkpoint, 16 now" in str(caught.value)
    assert "model.num_heads" in str(caught.value) and "kernels" not in str(caught.value)


def test_a_checkpoint_without_the_settings_of_later_versions_is_of_the_same_model() -> None:
    saved = {"config": {"model": {"hidden_size": 8, "mixers": {"delta": {"key_dim": 4}}}}}
    now = {"hidden_size": 8, "mixers": {"delta": {"key_dim": 4, "later": None}}, "branch_norm": False}
    check_model(Path("step-00000002"), saved, now)
    with pytest.raises(UserError, match=r"model\.branch_norm: False in the checkpoint, True now"):
        check_model(Path("step-00000002"), saved, now | {"branch_norm": True})


def test_tensors_that_do_not_fit(checkpoints: Path) -> None:
    with pytest.raises(UserError, match=r"'model.a' has shape \(40, 5\), the model wants \(40, 6\)"):
        load_newest(checkpoints, {"model.a": torch.zeros(40, 6)})
    with pytest.raises(UserError, match=r"no tensor .model\.aa.; did you mean .model\.a."):
        load_newest(checkpoints, {"model.aa": torch.zeros(40, 5)})
