"""What another model's config.json says: keys read one by one, so that unknown keys show."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fusiontree.convert.hf import NO_EFFECT
from fusiontree.utils.errors import UserError

TIED = "tie_word_embeddings"
LARGEST = 1e18
"""Above every size and base of positions; also excludes infinity and NaN."""


class Stated(NamedTuple):
    """What a configuration says of one part of its model."""

    part: str
    value: Any
    """Value of our setting, or the reason why no setting computes the same."""


@dataclass
class Foreign:
    """The configuration of another model."""

    file: Path
    kind: str
    """Its ``model_type``."""
    settings: dict[str, Stated] = field(default_factory=dict)
    """Settings of the section ``model``, dotted, under which ours computes the same."""
    obstacles: dict[str, Stated] = field(default_factory=dict)
    """By key: what no setting expresses."""
    longest: int | None = None
    """Tokens of the longest text that it was made for."""

    @property
    def tied(self) -> bool:
        """True if the embedding is also the head."""
        return bool(self.settings[TIED].value) if TIED in self.settings else False


class Reading:
    """A configuration of which every key is accounted for."""

    def __init__(self, foreign: Foreign, values: dict[str, Any]) -> None:
        self.foreign = foreign
        self._values = values
        self._read = {"model_type"}

    def take(self, key: str, default: Any = None) -> Any:
        """Return a value, ``default`` where the key is absent or null."""
        self._read.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def gives(self, key: str) -> bool:
        """Return whether the file has the key, even with null."""
        return key in self._values

    def number(self, key: str, default: Any, kind: type = int) -> Any:
        """Return a finite number of the type.

        Raises:
            UserError: the value is something else.
        """
        return self.checked(key, self.take(key, default), kind)

    def checked(self, key: str, value: Any, kind: type) -> Any:
        """Return ``value`` as a finite number of the type, or raise UserError."""
        fits = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        if not fits or not 0 < value < LARGEST:
            raise UserError(f"{self.foreign.file}: '{key}' is {value!r}, and a number above 0 is expected")
        return kind(value)

    def set(self, part: str, name: str, value: Any) -> None:
        """State the value of a setting of ours."""
        self.foreign.settings[name] = Stated(part, value)

    def obstacle(self, key: str, part: str, why: str) -> None:
        """State that no setting of ours expresses a key."""
        self._read.add(key)
        self.foreign.obstacles[key] = Stated(part, why)

    def only(self, key: str, wanted: Any, default: Any, part: str) -> None:
        """Make a value other than ``wanted`` an obstacle."""
        value = self.take(key, default)
        if value != wanted:
            self.obstacle(key, part, f"is {value!r}; here it is always {wanted!r}")

    def finish(self) -> None:
        """Make unknown keys obstacles, and code that comes with the folder."""
        if code := self._values.get("auto_map"):
            self.obstacle("auto_map", "model", f"is {code!r}, code of its own, which may compute anything")
        for key, value in self._values.items():
            if key not in self._read and key not in NO_EFFECT and value not in (None, False):
                self.obstacle(key, "model", f"is {value!r}, whose effect is not known here")
