"""Whether two configurations describe the same model; importing it needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_BEFORE = {"branch_norm": False, "branch_mix": "gate", "mlp_input": "branches", "global_rope": True}
"""Settings that came later than the first runs, with the values that describe models of versions without them."""


def different_settings(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return name, saved and wanted value of each setting that makes two models different, in order of names.

    Args:
        saved: the section ``model`` as plain values, perhaps of an earlier version; empty if it is not known.
        wanted: the section as plain values. An absent setting and null mean the same.
    """
    before = {name: value for name, value in _BEFORE.items() if name in wanted} | dict(saved)
    names = sorted((before.keys() | wanted.keys()) - {"kernels"}) if saved else []  # kernels affect speed alone
    return [pair for name in names for pair in _differing(f"model.{name}", before.get(name), wanted.get(name))]


def _differing(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the settings that differ, with both values: of sections, the settings in them."""
    if old == new:
        return
    if not (isinstance(old, dict) and isinstance(new, dict)):
        yield name, old, new
        return
    for key in dict.fromkeys([*old, *new]):
        yield from _differing(f"{name}.{key}", old.get(key), new.get(key))
