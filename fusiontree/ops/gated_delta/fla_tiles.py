"""Tiles, warps and stages of fla-core's kernels, so that they are not chosen anew by every process.

fla-core lets Triton's autotuner compile and time up to 12 variants of nine kernels, minutes before a process's first
step. Variants sum in different orders, so that two starts of a run, and two of its ranks, could differ in rounding.
"""

from __future__ import annotations

import importlib
from typing import Any

MEASURED = (9, 0)
"""Compute capability of the GPUs on which the variants below were chosen; on others, fla-core measures."""
WIDEST = 128
"""Channels of a key or value up to which the variants fit into shared memory; beyond, fla-core measures."""

_KERNELS: dict[str, dict[str, dict[str, int]]] = {
    "fla.ops.utils.cumsum": {"chunk_local_cumsum_scalar_kernel": {"num_warps": 2}},
    "fla.ops.gated_delta_rule.chunk_fwd": {
        "chunk_gated_delta_rule_fwd_kkt_solve_kernel": {"BK": 64, "num_warps": 1},
    },
    "fla.ops.gated_delta_rule.wy_fast": {
        "recompute_w_u_fwd_kernel": {"num_warps": 4, "num_stages": 3},
        "prepare_wy_repr_bwd_kernel": {"num_warps": 4, "num_stages": 3},
    },
    "fla.ops.common.chunk_delta_h": {
        "chunk_gated_delta_rule_fwd_kernel_h_blockdim64": {"BV": 32, "num_warps": 4, "num_stages": 4},
        "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64": {"BV": 32, "num_warps": 4, "num_stages": 3},
    },
    "fla.ops.common.chunk_o": {
        "chunk_fwd_kernel_o": {"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 3},
        "chunk_bwd_kernel_dv_local": {"num_warps": 2, "num_stages": 2},
        "chunk_bwd_kernel_dqkwg": {"num_warps": 4, "num_stages": 2},
    },
}
"""The fastest variants for one row of 32,768 tokens with 14 key heads and 28 value heads of 128 channels."""


def choose_tiles() -> None:
    """Let each kernel of fla-core have one variant for keys and values of at most :data:`WIDEST` channels.

    A kernel of another name, or without the variant, stays as fla-core has it.
    """
    for module_name, kernels in _KERNELS.items():
        module = importlib.import_module(module_name)
        for name, wanted in kernels.items():
            tuner = _autotuner(getattr(module, name, None))
            if tuner is not None:
                tuner.early_config_prune = _Chosen(wanted)


class _Chosen:
    """Prunes an autotuner's variants to the one wanted."""

    def __init__(self, wanted: dict[str, int]) -> None:
        self.wanted = wanted

    def __call__(self, configs: list[Any], arguments: dict[str, Any], **given: Any) -> list[Any]:
        """Return the wanted variant alone, or all of them if it is missing or the heads are too wide."""
        sizes = {**arguments, **given}
        if max(sizes.get("K") or 0, sizes.get("V") or 0) > WIDEST:
            return configs
        return [config for config in configs if self._is_wanted(config)][:1] or configs

    def _is_wanted(self, config: Any) -> bool:
        values = {**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages}
        return all(values.get(name) == value for name, value in self.wanted.items())


def _autotuner(kernel: Any) -> Any:
    """Return the autotuner within a kernel's decorators, or None."""
    while kernel is not None and not hasattr(kernel, "early_config_prune"):
        kernel = getattr(kernel, "fn", None)
    return kernel
