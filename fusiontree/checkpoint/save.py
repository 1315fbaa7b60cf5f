"""Saving one checkpoint from one process."""

from __future__ import annotations

from fusiontree.checkpoint.folders import STATE
from fusiontree.checkpoint.saver import save_checkpoint

__all__ = ["STATE", "save_checkpoint"]
