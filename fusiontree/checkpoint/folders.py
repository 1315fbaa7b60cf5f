"""The folders under RUN/checkpoints: their names, which of them are complete, and their removal."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from fusiontree.utils.files import fsync_directory

MANIFEST = "manifest.json"
"""Written last: a folder without it is no checkpoint."""

STATE = "state.json"
"""Small values of the training state: step, data position, configuration."""

_STEP = re.compile(r"step-(\d{8})$")
_PARTIAL = ".partial-"
_DAMAGED = "damaged-"


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


def remove_folder(folder: Path) -> None:
    """Delete a checkpoint. Renamed first: a kill in the middle must not leave half of one that looks whole."""
    doomed = folder.with_name(f"{_PARTIAL}removed-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint to ``damaged-step-XXXXXXXX``, which no resume and no retention counts.

    Nothing in it is changed: a repaired checkpoint is renamed back by hand.

    Raises:
        OSError: it cannot be renamed.
    """
    aside, number = folder.with_name(f"{_DAMAGED}{folder.name}"), 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{_DAMAGED}{folder.name}-{number}")
    folder.rename(aside)
    fsync_directory(folder.parent)
    return aside
