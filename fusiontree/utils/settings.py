"""The base of every configuration section: typed, strict, each field documented.

Each room declares its own section in its ``config.py`` by deriving from :class:`Section`. Reading a
configuration needs no torch, so these modules import none.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from fusiontree.utils.environment import expand_path
from fusiontree.utils.errors import nearest

log = logging.getLogger(__name__)


PathText = Annotated[str, AfterValidator(expand_path)]
"""A path or URL in the configuration; see :func:`expand_path`."""


class Section(BaseModel):
    """A group of settings. Unknown keys are errors; values are never silently converted to another type."""

    renamed: ClassVar[dict[str, str]] = {}
    """Renamed settings: former name -> present name."""

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        strict=True,
        frozen=True,
        validate_default=True,
        populate_by_name=True,
        use_attribute_docstrings=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _off_is_a_word(cls, values: Any) -> Any:
        """YAML reads a bare ``off`` as false and ``on`` as true; for settings with these choices, restore the word."""
        if not isinstance(values, dict):
            return values
        meant = cls._under_present_names(values)
        for name, field in cls.model_fields.items():
            key = field.alias or name
            for value, word in ((False, "off"), (True, "on")):
                if meant.get(key) is value and word in get_args(field.annotation):
                    meant[key] = word
        return meant

    @classmethod
    def _under_present_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return ``values`` with former names replaced; each warns once per process.

        Raises:
            ValueError: a setting is given under its former and its present name.
        """
        present = dict(values)
        for old, new in cls.renamed.items():
            if old not in present:
                continue
            if new in present:
                raise ValueError(f"'{old}' is the former name of '{new}', and both are given; remove '{old}'")
            present[new] = present.pop(old)
            warn_of_former_name(old, new)
        return present

    @classmethod
    def known_keys(cls) -> list[str]:
        """Names that the YAML file may use in this section."""
        return [field.alias or name for name, field in cls.model_fields.items()]


@functools.cache
def warn_of_former_name(old: str, new: str) -> None:
    """Warn once per process that a setting was renamed."""
    log.warning("the setting '%s' is now named '%s'", old, new)


def setting(default: Any = ..., help: str = "", *, unit: str | None = None, **constraints: Any) -> Any:
    """Declare a field of a :class:`Section`.

    Args:
        default: the value when the file is silent; ``...`` makes the field required.
        help: one sentence on the effect of the field.
        unit: the unit of the value ("tokens", "steps", "seconds"), shown by ``--help``.
        constraints: passed to pydantic (``ge``, ``gt``, ``le``, ``lt``, ``alias``, ``min_length`` …).
    """
    if isinstance(default, (list, dict)) or callable(default):
        factory = default if callable(default) else (lambda: type(default)(default))
        constraints["default_factory"] = factory
    else:
        constraints["default"] = default
    extra: Any = {"unit": unit} if unit else None
    return Field(description=help, json_schema_extra=extra, **constraints)


def explain(problem: Any, place: str) -> str:
    """Return place and value of one of pydantic's problems in a file, but for an unknown key.

    Args:
        problem: an element of ``ValidationError.errors()``.
        place: dotted name of the setting; empty for the whole file.
    """
    if problem["type"] == "missing":
        return f"'{place}' is missing; it has no default"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{place}: {message}" if place else message
    return f"'{place}' is {problem['input']!r}: {message[0].lower() + message[1:]}"


def check_positive_ranges(section: Section, *names: str) -> None:
    """Check settings that are ranges ``[low, high]`` of positive numbers.

    Raises:
        ValueError: a range does not have ``0 < low <= high``.
    """
    for name in names:
        low, high = getattr(section, name)
        if not 0 < low <= high:
            raise ValueError(f"{name} is [{low}, {high}]; it needs 0 < low <= high")


def validated(section: type[Section], values: Any, place: str) -> Section:
    """Return a section of ``values``, which are at ``place`` of the configuration.

    Raises:
        ValueError: a key is unknown or a value is wrong.
    """
    if isinstance(values, section):
        return values
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ValueError("; ".join(_problems(error, section.known_keys(), place))) from None


def _problems(error: ValidationError, known: list[str], place: str) -> Iterable[str]:
    for problem in error.errors():
        dotted = ".".join(map(str, (place, *problem["loc"])))
        if problem["type"] == "extra_forbidden":
            key = str(problem["loc"][-1])
            hint = nearest(key, known) or f"; known keys: {', '.join(known)}"
            yield f"unknown key '{dotted}'{hint}"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = "" if problem["type"] in ("value_error", "missing") else f" is {problem['input']!r}"
            yield f"{dotted}{given}: {message}"
