"""Fuses the operations between matrix products: on GPUs each formula is one Triton or torch.compile kernel.

Unfused, each operation of a formula reads and writes the full activation; at 32K tokens that costs more than the
arithmetic of the layer's smaller matrix products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode

from fusiontree.ops.dispatch import Backend, Operation, anywhere, loader, triton_unavailable

_KINDS = 64
"""Maximum number of input signatures that a formula is compiled for in one process."""


def needs_gpu(device: torch.device) -> str | None:
    """Return why fusion is not offered on ``device``, or None; on CPUs, compilation takes longer than a small run."""
    return None if device.type == "cuda" else "its kernels are compiled for GPUs"


@functools.cache
def compiled(formula: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``formula`` compiled; forward and backward become fused kernels.

    The result stays compiled under a TorchDispatchMode (as activation checkpointing uses), where torch would silently
    run the formula uncompiled.
    """
    from torch._dynamo import config as limits  # imported here, as it takes a second and CPU runs do not need it

    # One or several rows, one or several tokens, head widths, dtypes: more combinations than torch's limit of eight,
    # beyond which it would run a formula uncompiled.
    limits.recompile_limit = max(limits.recompile_limit, _KINDS)
    fast = torch.compile(formula)

    @functools.wraps(formula)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not is_in_torch_dispatch_mode():
            return fast(*args, **kwargs)
        with _disable_current_modes():
            return fast(*args, **kwargs)

    return run


def _as_it_is(formula: Callable[..., Any]) -> Callable[..., Any]:
    return formula


ELEMENTWISE = Operation(
    "elementwise",
    [
        Backend("compiled", lambda: compiled, needs_gpu),
        Backend("reference", lambda: _as_it_is, anywhere),
    ],
)


def fused(formula: Callable[..., Any], backend: str, device_type: str) -> Callable[..., Any]:
    """Return ``formula``, compiled if the backend fuses on this device."""
    return ELEMENTWISE.choose(backend, device_type)(formula)


def with_kernel(shown: str, formula: Callable[..., Any], kernel: str, setting: str = "elementwise") -> Operation:
    """Return an operation that computes ``formula``, on GPUs by one of this project's Triton kernels.

    The kernel is no faster on the GPU than the compiled formula. But a compiled call costs the host four times as much
    as a launch, and layers split over ranks are limited by the host.

    Args:
        shown: name of the operation in the log.
        formula: the reference.
        kernel: ``module:function`` with the same signature, imported when first selected.
        setting: name of the setting under ``model.kernels``.
    """
    return Operation(
        setting,
        [
            Backend("triton", loader(kernel), triton_unavailable),
            Backend("compiled", lambda: compiled(formula), needs_gpu),
            Backend("reference", lambda: formula, anywhere),
        ],
        shown=shown,
    )
