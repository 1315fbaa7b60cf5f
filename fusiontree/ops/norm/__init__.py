"""Root mean square norms."""

from __future__ import annotations

from fusiontree.ops.norm.reference import gated_rms_norm, rms_norm

__all__ = ["gated_rms_norm", "rms_norm"]
