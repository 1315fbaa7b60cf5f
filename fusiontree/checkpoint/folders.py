"""The folders under RUN/checkpoints: names, which are complete, which to keep."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from fusiontree.checkpoint.config import CheckpointConfig

MANIFEST = "manifest.json"
"""Written last: a folder without it is no checkpoint."""

STATE = "state.json"
"""Small values of the training state: step, data position, configuration."""

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


def remove_folder(folder: Path) -> None:
    """Delete a checkpoint. Renamed first: a kill in the middle must not leave half of one that looks whole."""
    doomed = folder.with_name(f"{_PARTIAL}removed-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def remove_old(checkpoints: Path, config: CheckpointConfig) -> list[Path]:
    """Delete complete checkpoints that none of ``keep_last``, ``keep_every`` and ``keep_best`` keeps; return them."""
    if not config.keep_last:
        return []
    complete = complete_checkpoints(checkpoints)
    kept = set(complete[-config.keep_last :])
    if config.keep_every:
        kept |= {f for f in complete if folder_step(f) % config.keep_every == 0}
    if config.keep_best:
        losses = {f: loss for f in complete if (loss := validation_loss(f)) is not None}
        kept |= set(sorted(losses, key=lambda f: (losses[f], folder_step(f)))[: config.keep_best])
    removed = [f for f in complete if f not in kept]
    for folder in removed:
        remove_folder(folder)
    return removed


def validation_loss(folder: Path) -> float | None:
    """Return the validation loss at a checkpoint's step, or None where there was no validation (or none readable)."""
    try:
        return float(json.loads((folder / STATE).read_text(encoding="utf-8"))["validation_loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
