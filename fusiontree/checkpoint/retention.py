"""Which checkpoints a save leaves and which it deletes."""

from __future__ import annotations

import json
import math
from pathlib import Path

from fusiontree.checkpoint.config import CheckpointConfig
from fusiontree.checkpoint.folders import STATE, complete_checkpoints, folder_step, remove_folder
from fusiontree.checkpoint.manifest import CheckpointDamage, check_size, read_manifest


def remove_old(checkpoints: Path, config: CheckpointConfig, newest: int) -> list[Path]:
    """Delete the checkpoints that none of ``keep_last``, ``keep_every`` and ``keep_best`` keeps, and return them.

    Only checkpoints of the present history are counted or deleted: those of steps up to ``newest`` whose files are all
    there with their recorded sizes. A later step, or a folder with a truncated file, is one that a resume has passed
    over or would pass over; counting it would let it displace a good one.

    Args:
        checkpoints: RUN/checkpoints.
        config: what to keep.
        newest: the step that was saved last; its checkpoint always stays.
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
    """Return whether the manifest is readable and every file has its recorded size; nothing is hashed."""
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
