"""Mistakes that a layout could make, each to be seen by the parity table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch


@contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """Make the named mistake; None makes none."""
    if name is None:
        yield
        return
    target, replacement = MUTATIONS[name]
    with patch(target, replacement):
        yield


MUTATIONS: dict[str, tuple[str, Any]] = {}
