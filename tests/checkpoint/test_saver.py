"""Saves in the background: what is on disk, what training sees, what happens when something goes wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from fusiontree.checkpoint import saver as saver_module
from fusiontree.checkpoint import write_files as files_module
from fusiontree.checkpoint.config import CheckpointConfig
from fusiontree.checkpoint.folders import complete_checkpoints
from fusiontree.checkpoint.load import load_checkpoint, load_newest
from fusiontree.checkpoint.manifest import file_entries, read_manifest, write_manifest
from fusiontree.checkpoint.saver import Saver, SaveResult
from fusiontree.checkpoint.verify import verify
from fusiontree.checkpoint.write_files import write_files
from fusiontree.parallel.global_tensor import GlobalTensor, ShardSpec


def state(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    big = torch.randn(6, 40)
    return {
        "model.matrix": torch.randn(30, 7),
        "model.view": big[:, 3:9],  # not contiguous
        "model.slice": big[2:4],  # a part of a larger storage
        "model.half": torch.randn(5).bfloat16(),
        "model.scalar": torch.tensor(1.5),
        "optimizer.count": torch.arange(4),
    }


def blank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in tensors.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def saved(saver: Saver, step: int, tensors: dict[str, Tensor], *, wait: bool = False) -> SaveResult:
    saver.save(step, tensors, {"config": {}}, wait=wait)
    saver.wait()
    (result,) = saver.poll()
    return result


def make(folder: Path, **settings: object) -> Saver:
    return Saver(folder, CheckpointConfig(keep_last=0).model_copy(update=settings))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writing threads wait for this event."""
    event = threading.Event()

    def gated(*arguments: object) -> object:
        assert event.wait(60)
        return write_files(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(saver_module, "write_files", gated)
    yield event
    event.set()


@pytest.mark.parametrize("wait", [True, False])
def test_what_is_saved_is_loaded(tmp_path: Path, wait: bool) -> None:
    tensors = state()
    result = saved(make(tmp_path), 3, tensors, wait=wait)
    assert result.error is None and result.folder == tmp_path / "step-00000003"
    found = blank(tensors)
    assert load_checkpoint(result.folder, found)["step"] == 3
    assert equal(found, tensors)
    verify(result.folder)


def test_torch_loads_ours_and_ours_loads_torchs(tmp_path: Path) -> None:
    tensors = state()
    folder = saved(make(tmp_path), 1, tensors).folder
    warnings.filterwarnings("ignore")
    found = blank(tensors)
    dcp.load(found, checkpoint_id=folder, no_dist=True)
    assert equal(found, tensors)
    theirs = tmp_path / "step-00000009"
    tensors["model.turned"] = torch.randn(4, 6).T  # torch keeps strides
    dcp.save(tensors, checkpoint_id=theirs, no_dist=True)
    (theirs / "state.json").write_text('{"step": 9}')
    write_manifest(theirs, file_entries(list(theirs.iterdir()), theirs))
    found = blank(tensors)
    load_checkpoint(theirs, found)
    assert equal(found, tensors)


def test_rectangles_of_a_tensor_are_saved_and_loaded_by_other_rectangles(tmp_path: Path) -> None:
    whole = torch.arange(12 * 6, dtype=torch.float32).view(12, 6)
    pieces = []
    for ranges in (((0, 3), (6, 9)), ((3, 6), (9, 12))):
        spec = ShardSpec((12, 6), 0, ranges)
        flat = spec.cut(whole).reshape(-1)
        pieces += spec.pieces(flat[:17], 0) + spec.pieces(flat[17:], 17)
    folder = saved(make(tmp_path), 1, {"w": GlobalTensor((12, 6), pieces, torch.float32)}).folder
    found = {"w": torch.zeros(12, 6)}
    load_checkpoint(folder, found)
    assert torch.equal(found["w"], whole)
    spec = ShardSpec((12, 6), 1, ((0, 1), (3, 5)))
    mine = torch.zeros(spec.local_shape)
    load_checkpoint(folder, {"w": GlobalTensor((12, 6), spec.pieces(mine.view(-1)), torch.float32)})
    assert torch.equal(mine, spec.cut(whole))


def test_training_may_change_the_state_while_it_is_written(tmp_path: Path, gate: threading.Event) -> None:
    tensors = state()
    before = {name: t.clone() for name, t in tensors.items()}
    saver = make(tmp_path)
    saver.save(1, tensors, {"config": {}})
    for tensor in tensors.values():
        tensor.zero_()
    assert saver.poll() == [] and complete_checkpoints(tmp_path) == []
    gate.set()
    saver.wait()
    found = blank(tensors)
    load_checkpoint(saver.poll()[0].folder, found)
    assert equal(found, before)


def test_one_save_at_a_time_and_its_memory_is_used_again(tmp_path: Path, gate: threading.Event) -> None:
    saver = make(tmp_path)
    saver.save(1, state(1), {"config": {}})
    assert saver._snapshot is not None
    memory = saver._snapshot._memory.ctypes.data
    threading.Timer(0.2, gate.set).start()
    saver.save(2, state(2), {"config": {}})  # waits for the first
    assert [r.step for r in saver.poll()] == [1]
    saver.wait()
    assert saver._snapshot._memory.ctypes.data == memory
    for step in (1, 2):
        found = blank(state())
        load_checkpoint(tmp_path / f"step-{step:08d}", found)
        assert equal(found, state(step))


def test_without_async_nothing_is_copied(tmp_path: Path) -> None:
    saver = make(tmp_path, async_=False)
    saver.save(1, state(), {"config": {}})
    assert saver._snapshot is None
    assert [r.error for r in saver.poll()] == [None]


def test_a_step_that_is_saved_again_takes_the_place_of_the_old(tmp_path: Path) -> None:
    saver = make(tmp_path)
    saved(saver, 1, state(1))
    assert saved(saver, 1, state(2)).error is None
    found = blank(state())
    load_checkpoint(tmp_path / "step-00000001", found)
    assert equal(found, state(2))
    assert [f.name for f in tmp_path.iterdir()] == ["step-00000001"]


def test_a_kill_while_the_old_is_deleted_leaves_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver, remove = make(tmp_path), shutil.rmtree
    saved(saver, 1, state(1))
    complete: list[list[Path]] = []

    def removing(path: Path, **options: bool) -> None:
        if path.exists() and "removed" in path.name:
            complete.append(complete_checkpoints(tmp_path))
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", removing)
    assert saved(saver, 1, state(2)).error is None
    assert complete == [[tmp_path / "step-00000001"]]


def test_the_manifest_covers_every_file(tmp_path: Path) -> None:
    extra = tmp_path / "tokenizer.json"
    extra.write_text("{}")
    saver = make(tmp_path / "checkpoints")
    saver.save(1, state(), {"config": {}}, [extra], wait=True)
    folder = saver.poll()[0].folder
    assert {f.name for f in folder.iterdir()} == {*read_manifest(folder), "manifest.json"}
    assert {"tokenizer.json", "state.json", ".metadata", "tensors.index", "__0_0.distcp"} == read_manifest(
        folder
    ).keys()


def breaks_after_one(tmp_path: Path, breaking: Callable[[], None], mend: Callable[[], None]) -> str:
    """Save, break something, save: the result says why, the first checkpoint is whole, and mended it goes on."""
    saver = make(tmp_path / "checkpoints")
    assert saved(saver, 1, state(1)).error is None
    breaking()
    result = saved(saver, 2, state(2))
    assert result.error is not None and not result.fatal
    mend()
    if (tmp_path / "checkpoints" / "step-00000001").exists():
        assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
        found = blank(state())
        load_checkpoint(tmp_path / "checkpoints" / "step-00000001", found)
        assert equal(found, state(1))
    assert saved(saver, 3, state(3)).error is None
    return result.error


def test_no_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = saver_module.free_bytes
    text = breaks_after_one(
        tmp_path,
        lambda: monkeypatch.setattr(saver_module, "free_bytes", lambda folder: 1000),
        lambda: monkeypatch.setattr(saver_module, "free_bytes", real),
    )
    assert "0.0 MB free" in text and "keep_last" in text and "00000002" in text


@pytest.mark.parametrize("place", ["write", "manifest"])
def test_an_error_of_the_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    module, name = {"write": (saver_module, "write_files"), "manifest": (files_module, "write_manifest")}[place]
    real = getattr(module, name)

    def fails(folder: Path, *_: object) -> None:
        raise OSError(5, "Input/output error", str(folder / "some-file"))

    text = breaks_after_one(
        tmp_path,
        lambda: monkeypatch.setattr(module, name, fails),
        lambda: monkeypatch.setattr(module, name, real),
    )
    assert "some-file: Input/output error" in text


def test_the_folder_removed_before_and_during_a_save(tmp_path: Path, gate: threading.Event) -> None:
    checkpoints = tmp_path / "checkpoints"
    gate.set()
    saver = make(checkpoints)
    assert saved(saver, 1, state()).error is None
    shutil.rmtree(checkpoints)
    assert saved(saver, 2, state()).error is None  # it is made anew
    gate.clear()
    saver.save(3, state(), {"config": {}})
    while not (checkpoints / ".partial-step-00000003").exists():
        pass
    shutil.rmtree(checkpoints)
    gate.set()
    saver.wait()
    error = saver.poll()[0].error
    assert error is not None and "__0_0.distcp: No such file or directory" in error
    assert saved(saver, 4, state()).error is None


def test_a_process_that_lost_its_run_folder_commits_nothing(tmp_path: Path) -> None:
    saver = Saver(tmp_path, CheckpointConfig(), may_commit=lambda: "taken over by another")
    result = saved(saver, 1, state())
    assert result.fatal and result.error == "taken over by another"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", place]).returncode:
        pytest.skip("a small tmpfs cannot be mounted here (needs root and the right to mount)")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of free space is made to pass, as when another program fills the disk meanwhile."""
    monkeypatch.setattr(saver_module, "free_bytes", lambda folder: 1 << 40)
    saver = make(small_disk / "checkpoints")
    tensors = {"model.w": torch.randn(1 << 18)}  # 1 MB; three do not fit beside the directory
    results = [saved(saver, step, tensors) for step in (1, 2, 3, 4)]
    failed = [r for r in results if r.error]
    assert failed and all("__0_0.distcp: No space left on device" in str(r.error) for r in failed)
    good = complete_checkpoints(small_disk / "checkpoints")
    assert len(good) == 4 - len(failed) > 0
    found = blank(tensors)
    load_newest(small_disk / "checkpoints", found)
    assert equal(found, tensors)
    shutil.rmtree(good[0])
    assert saved(saver, 5, tensors).error is None
