"""The ``model.kernels`` section: the backend of each operation."""

from __future__ import annotations

import logging
from typing import Any, Literal

from pydantic import field_validator

from fusiontree.utils.settings import Section, setting

log = logging.getLogger(__name__)

_REMOVED = {"flash2": "varlen", "flash3": "auto"}
"""Attention backends of earlier versions, and the replacement for each in old configurations and checkpoints."""


class KernelsConfig(Section):
    """Backends of the operations in ``ops/``. ``auto`` takes the fastest backend that runs on the device."""

    ssd: Literal["auto", "reference", "mamba_ssm", "triton"] = setting("auto", "State space scan.")
    gated_delta: Literal["auto", "reference", "chunked", "fla"] = setting(
        "auto", "Recurrence of Gated DeltaNet; fla is the package fla-core."
    )
    conv: Literal["auto", "reference", "compiled", "triton"] = setting("auto", "Depthwise causal convolution.")
    attention: Literal["auto", "reference", "sdpa", "varlen", "flex", "flash4"] = setting(
        "auto", "Local and global attention; flash4 is the package flash-attn-4, varlen is torch's flash-attn 2."
    )
    elementwise: Literal["auto", "reference", "compiled"] = setting(
        "auto", "Operations between matrix products: norms, rotary positions, gate mix."
    )
    cross_entropy: Literal["auto", "reference", "chunked"] = setting("auto", "Loss over the vocabulary.")

    @field_validator("attention", mode="before")
    @classmethod
    def _replace_removed(cls, value: Any) -> Any:
        if isinstance(value, str) and value in _REMOVED:
            log.warning("kernels.attention=%s no longer exists; using %s instead", value, _REMOVED[value])
            return _REMOVED[value]
        return value
