"""The reference of all settings, for ``--help``."""

from __future__ import annotations

import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fusiontree.config.load import section_type
from fusiontree.config.root import Config
from fusiontree.utils.settings import Section


def describe_settings(section: type[Section] = Config, prefix: str = "") -> str:
    """Return one line a setting: its dotted name, type, default, unit and meaning."""
    lines: list[str] = []
    for name, field in section.model_fields.items():
        dotted = f"{prefix}{field.alias or name}"
        nested = section_type(field.annotation)
        is_section = nested is field.annotation  # not a list of sections
        if nested is not None and is_section:
            lines += ["", f"{dotted}: {(nested.__doc__ or '').strip().splitlines()[0]}"]
            lines.append(describe_settings(nested, f"{dotted}."))
            continue
        lines.append(f"  {dotted}  [{_type_name(field.annotation)}{_unit(field)}] {_default(field)}")
        lines.append(f"      {field.description}")
    return "\n".join(lines)


def _unit(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    return f", {extra['unit']}" if isinstance(extra, dict) and "unit" in extra else ""


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    return "required" if default is PydanticUndefined else f"= {default}"


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_type_name(part) for part in get_args(annotation) if part is not type(None))
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
