"""Python's garbage collector, kept from looking through a million old objects in the middle of a step."""

from __future__ import annotations

import gc


def freeze() -> None:
    """Collect, and leave what is alive now (modules, compiled code, the model) out of all later collections.

    A full collection of a process that imported torch and its friends takes some hundred milliseconds, on each rank at
    another time, while the others wait. What comes after is collected as ever.
    """
    gc.collect()
    gc.freeze()


def unfreeze() -> None:
    """Undo :func:`freeze`, for when the run is over and its objects may go."""
    gc.unfreeze()
