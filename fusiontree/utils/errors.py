"""Errors that a user caused and can correct."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """A user's input is wrong: a config value, a path, a layout.

    Entry points print the message without a traceback and exit with code 2.
    The message names the value, the place and the way out.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint such as ``"; did you mean 'seq_len'?"`` or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""


def nearest_file(path: Path) -> str:
    """Return the hint of :func:`nearest` for a path that does not exist, from the names in its folder."""
    return nearest(path.name, (beside.name for beside in path.parent.iterdir())) if path.parent.is_dir() else ""
