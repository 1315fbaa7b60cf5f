"""Rotary position encoding (Su et al. 2021, "RoFormer")."""

from __future__ import annotations

from fusiontree.ops.rotary.reference import apply_rotary, rotary_tables

__all__ = ["apply_rotary", "rotary_tables"]
