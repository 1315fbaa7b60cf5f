"""Python's garbage collector, kept from looking through a million old objects in the middle of a step."""

from __future__ import annotations

import gc


def set_aside() -> None:
    """Collect, and leave what is alive now (modules, compiled code, the model) out of all later collections.

    A full collection of a process that imported torch and its friends takes some hundred milliseconds, on each rank at
    another time, while the others wait. What comes after is collected as ever.
    """
    gc.collect()
    gc.freeze()


def take_back() -> None:
    """Undo :func:`set_aside`, for when the run is over and its objects may go."""
    gc.unfreeze()
