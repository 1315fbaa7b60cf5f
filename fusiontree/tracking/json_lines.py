"""Lines of the record files: strict JSON objects."""

from __future__ import annotations

import json
import math
from typing import Any


def parse_line(line: bytes, key: str = "step") -> dict[str, Any] | None:
    """Return the record of a line, or None if it is damaged: no JSON object, or ``key`` is missing or of another type.

    Args:
        line: without its end.
        key: ``step``, an integer, or ``event``, a text.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    kind = str if key == "event" else int
    return record if isinstance(record, dict) and isinstance(record.get(key), kind) else None


def format_line(values: dict[str, Any]) -> str:
    """Return a line of strict JSON, in which a number that is not finite is null."""
    return json.dumps(finite(values), allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """Return ``value`` with None for each number in it that JSON cannot represent: infinite or NaN."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
