"""The folders under RUN/checkpoints: names, which are complete, which to keep."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from fusiontree.checkpoint.config import CheckpointConfig

MANIFEST = "manifest.json"
"""Written last: a folder without it is no checkpoint."""

_STEP = re.compile(r"step-(\d{8})$")
_PARTIAL = ".partial-"


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return checkpoints / f"step-{step:08d}"


def partial_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder that a checkpoint is written to before it is renamed."""
    return checkpoints / f"{_PARTIAL}step-{step:08d}"


def folder_step(folder: Path) -> int:
    """Return the step that a checkpoint folder's name gives.

    Raises:
        ValueError: the name is not ``step-XXXXXXXX``.
    """
    match = _STEP.match(folder.name)
    if not match:
        raise ValueError(f"'{folder}' is no checkpoint folder; its name should be step-XXXXXXXX")
    return int(match.group(1))


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the complete checkpoint folders, oldest first; found by looking, never by a pointer file."""
    if not checkpoints.is_dir():
        return []
    return sorted(f for f in checkpoints.iterdir() if _STEP.match(f.name) and (f / MANIFEST).is_file())


def remove_partial(checkpoints: Path) -> list[Path]:
    """Delete what killed saves left behind and return the deleted folders."""
    left = [f for f in checkpoints.glob(f"{_PARTIAL}*") if f.is_dir()] if checkpoints.is_dir() else []
    for folder in left:
        shutil.rmtree(folder)
    return left


def remove_old(checkpoints: Path, config: CheckpointConfig) -> list[Path]:
    """Delete complete checkpoints that ``keep_last`` and ``keep_every`` do not keep, and return them."""
    if not config.keep_last:
        return []
    old = complete_checkpoints(checkpoints)[: -config.keep_last]
    removed = [f for f in old if not (config.keep_every and folder_step(f) % config.keep_every == 0)]
    for folder in removed:
        # Renamed first: a kill in the middle of the deletion must not leave half a checkpoint that looks whole.
        doomed = folder.with_name(_PARTIAL + folder.name)
        folder.rename(doomed)
        shutil.rmtree(doomed)
    return removed
