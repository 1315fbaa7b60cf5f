"""Named parts of one kind, to which a user's module can add: mixers, optimizers, metrics, token sources, tasks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from fusiontree.utils.errors import UserError, nearest

Part = TypeVar("Part")


class Registry(Generic[Part]):
    """Parts by name; names are unique."""

    def __init__(self, kind: str) -> None:
        """Start empty; ``kind`` is the parts' noun in errors, such as ``mixer``."""
        self.kind = kind
        self._parts: dict[str, Part] = {}

    def register(self, name: str, part: Part) -> Part:
        """Add ``part`` and return it; adding the same part again changes nothing.

        Raises:
            UserError: another part has this name.
        """
        known = self._parts.setdefault(name, part)
        if known is not part:
            raise UserError(f"{self.kind} '{name}' is registered twice: {known!r} and {part!r}; rename one of them")
        return part

    def get(self, name: str) -> Part:
        """Return the part named ``name``.

        Raises:
            UserError: no part has this name.
        """
        if name not in self._parts:
            hint = nearest(name, self._parts) or f"; known: {', '.join(self.names())}"
            raise UserError(f"unknown {self.kind} '{name}'{hint}; a module that adds one is named with --plugin")
        return self._parts[name]

    def names(self) -> list[str]:
        """Return all names in the order in which they were added."""
        return list(self._parts)

    def items(self) -> Iterator[tuple[str, Part]]:
        """Yield each name with its part."""
        yield from self._parts.items()
