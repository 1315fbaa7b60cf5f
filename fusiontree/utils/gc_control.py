"""Keeps Python's garbage collector from scanning long-lived objects in the middle of a step."""

from __future__ import annotations

import gc


def freeze() -> None:
    """Collect, and exclude all objects alive now (modules, compiled code, the model) from later collections.

    A full collection takes some hundred milliseconds in a process that imported torch, at a different time on each
    rank, while the others wait. Objects created later are collected as usual.
    """
    gc.collect()
    gc.freeze()


def unfreeze() -> None:
    """Undo :func:`freeze` after the run, so that its objects can be freed."""
    gc.unfreeze()
