"""The folders under RUN/checkpoints: names, completeness, removal."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from fusiontree.utils.files import fsync_directory

MANIFEST = "manifest.json"
"""Written last: a folder without it is incomplete."""

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
        raise ValueError(f"'{folder}' is not a checkpoint folder; its name must be step-XXXXXXXX")
    return int(match.group(1))


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the complete checkpoint folders, oldest first; lists the folder and never relies on a pointer file."""
    if not checkpoints.is_dir():
        return []
    return sorted(f for f in checkpoints.iterdir() if _STEP.match(f.name) and (f / MANIFEST).is_file())


def incomplete_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the checkpoint folders without a manifest, oldest first: a save never leaves one, so they are damaged."""
    if not checkpoints.is_dir():
        return []
    return sorted(f for f in checkpoints.iterdir() if _STEP.match(f.name) and not (f / MANIFEST).is_file())


def damaged_steps(checkpoints: Path) -> set[int]:
    """Return the steps of damaged checkpoints: those set aside, and those without a manifest."""
    aside = checkpoints.glob(f"{_DAMAGED}step-*") if checkpoints.is_dir() else ()
    found = (re.match(rf"{_DAMAGED}step-(\d{{8}})(-\d+)?$", folder.name) for folder in aside)
    steps = {int(match.group(1)) for match in found if match}
    return steps | {folder_step(folder) for folder in incomplete_checkpoints(checkpoints)}


def remove_partial(checkpoints: Path) -> list[Path]:
    """Delete leftovers of killed saves and return the deleted folders."""
    left = [f for f in checkpoints.glob(f"{_PARTIAL}*") if f.is_dir()] if checkpoints.is_dir() else []
    for folder in left:
        shutil.rmtree(folder)
    return left


def put_away(folder: Path) -> Path:
    """Give a checkpoint the name of a leftover, which :func:`remove_partial` deletes; return its new path."""
    doomed = folder.with_name(f"{_PARTIAL}removed-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    return doomed


def remove_folder(folder: Path) -> None:
    """Delete a checkpoint. Renames it first, so that a kill during deletion leaves no half that looks complete."""
    shutil.rmtree(put_away(folder))


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint to ``damaged-step-XXXXXXXX``, which resume and retention ignore.

    Its content does not change: after a repair, rename it back by hand.

    Raises:
        OSError: the folder cannot be renamed.
    """
    aside, number = folder.with_name(f"{_DAMAGED}{folder.name}"), 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{_DAMAGED}{folder.name}-{number}")
    folder.rename(aside)
    fsync_directory(folder.parent)
    return aside
