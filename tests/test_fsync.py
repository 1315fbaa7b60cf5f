"""Content reaches the disk before it is renamed to its final name, and the rename after: a power cut loses neither.

A killed process loses nothing that the kernel has, so no test that kills can see a missing fsync.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusiontree.utils.files import write_json
from tests.data.datasets import write
from tests.helpers import save_checkpoint

Log = list[tuple[str, Path, Path]]
"""("sync", file or folder, same) and ("rename", source, target), in order."""


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Log:
    events: Log = []

    def synced(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(("sync", path, path))

    def renaming(real: Callable[..., None]) -> Callable[..., None]:
        def rename(source: Any, target: Any, **options: Any) -> None:
            real(source, target, **options)
            if (there := Path(target).absolute()).is_relative_to(tmp_path):  # another thread may write files elsewhere
                events.append(("rename", Path(source).absolute(), there))

        return rename

    monkeypatch.setattr(os, "fsync", synced)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, renaming(getattr(os, name)))
    return events


def assert_durable(log: Log, folder: Path) -> None:
    """Assert of each file under ``folder`` that its content, and each rename on its way, was synced in time."""
    synced = {path: number for number, (kind, path, _) in enumerate(log) if kind == "sync"}
    renames = [(number, source, target) for number, (kind, source, target) in enumerate(log) if kind == "rename"]
    assert renames
    for number, source, target in renames:
        assert synced.get(target.parent, -1) > number, f"the rename to {target} was not synced"
        moved = [path for path in target.rglob("*") if path.is_file()] if target.is_dir() else [target]
        for path in moved:
            name = source / path.relative_to(target) if target.is_dir() else source
            origin = next((before for _, before, after in renames if after == name), name)
            assert synced.get(origin, number) < number, f"{path} was renamed before its content was synced"
    assert {target for *_, target in renames} >= {folder}


def test_a_checkpoint(log: Log, tmp_path: Path) -> None:
    extra = tmp_path / "tokenizer.json"
    extra.write_text("{}")
    folder = save_checkpoint(tmp_path / "checkpoints", 3, {"w": torch.arange(9.0)}, {"tokens": 1}, [extra])
    assert_durable(log, folder)
    assert len(list(folder.iterdir())) == 6  # tensors, index, metadata, state, tokenizer, manifest


def test_a_small_file(log: Log, tmp_path: Path) -> None:
    write_json(tmp_path / "values.json", {"a": 1})
    assert_durable(log, tmp_path / "values.json")


def test_a_dataset(log: Log, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", [[np.array([1, 2, 256])], [np.array([3, 256])]])
    for path in folder.iterdir():
        assert_durable(log, path)
