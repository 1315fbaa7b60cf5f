"""Which implementation computes each operation."""

from __future__ import annotations

from typing import Literal

from fusiontree.utils.section import Section, setting


class KernelsConfig(Section):
    """Backends of the operations in ``ops/``. ``auto`` takes the fastest that is installed and fits the device."""

    ssd: Literal["auto", "reference", "mamba_ssm", "triton"] = setting("auto", "State space scan.")
    conv: Literal["auto", "reference", "compiled", "triton"] = setting("auto", "Depthwise causal convolution.")
    attention: Literal["auto", "reference", "sdpa", "varlen", "flash2", "flex", "flash3", "flash4"] = setting(
        "auto", "Local and global attention; flash4, flash3 and flash2 are packages of their own, varlen is torch's."
    )
    elementwise: Literal["auto", "reference", "compiled"] = setting(
        "auto", "Norms, rotary positions, gate mix: what lies between the matrix products."
    )
    cross_entropy: Literal["auto", "reference", "chunked"] = setting("auto", "Loss over the vocabulary.")
