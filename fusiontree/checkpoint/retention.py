"""Retention: deletes old checkpoints after a save."""

from __future__ import annotations

import json
import math
from pathlib import Path

from fusiontree.checkpoint.config import CheckpointConfig
from fusiontree.checkpoint.folders import STATE, complete_checkpoints, folder_step, remove_folder
from fusiontree.checkpoint.manifest import CheckpointDamage, check_size, read_manifest


def remove_old(checkpoints: Path, config: CheckpointConfig, newest: int) -> list[Path]:
    """Delete and return the checkpoints that none of ``keep_last``, ``keep_every`` and ``keep_best`` keeps.

    Only valid checkpoints are counted or deleted: steps up to ``newest`` with all files of their recorded sizes. Later
    steps, and folders with a missing or truncated file, were or would be skipped by a resume; if they counted, they
    would displace good checkpoints.

    Args:
        checkpoints: RUN/checkpoints.
        config: the retention settings.
        newest: the last saved step; its checkpoint is always kept.
    """
    if not config.keep_last:
        return []
    history = [f for f in complete_checkpoints(checkpoints) if folder_step(f) <= newest and has_all_files(f)]
    kept = set(history[-config.keep_last :])
    if config.keep_every:
        kept |= {f for f in history if folder_step(f) % config.keep_every == 0}
    if config.keep_best:
        losses = {f: loss for f in history if (loss := validation_loss(f)) is not None}
        kept |= set(sorted(losses, key=lambda f: (losses[f], folder_step(f)))[: config.keep_best])
    removed = [f for f in history if f not in kept]
    for folder in removed:
        remove_folder(folder)
    return removed


def has_all_files(folder: Path) -> bool:
    """Return True if the manifest is readable and every file has its recorded size; hashes nothing."""
    try:
        for name, entry in read_manifest(folder).items():
            check_size(folder / name, entry)
    except CheckpointDamage:
        return False
    return True


def validation_loss(folder: Path) -> float | None:
    """Return the validation loss at a checkpoint's step; None if it was not validated, or the loss is not finite."""
    try:
        loss = float(json.loads((folder / STATE).read_text(encoding="utf-8"))["validation_loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return loss if math.isfinite(loss) else None
