"""Mixing two branches by a gate."""

from __future__ import annotations

from fusiontree.ops.gate.reference import gate_mix

__all__ = ["gate_mix"]
