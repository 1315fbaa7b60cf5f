"""Fusing what lies between the matrix products: on GPUs each formula is one kernel, of our own or of torch.compile.

Unfused, each step of such a formula reads and writes the whole activation; at 32K tokens that costs more than the
arithmetic of the layer's smaller products.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode

from fusiontree.ops.dispatch import Backend, Operation, anywhere, triton_unavailable

_KINDS = 64
"""Kinds of inputs that a formula may be compiled for in one process."""


def needs_gpu(device: torch.device) -> str | None:
    """Why fusion is not offered on ``device``, or None: on CPUs compiling takes longer than a small run."""
    return None if device.type == "cuda" else "its kernels are compiled for GPUs"


@functools.cache
def compiled(formula: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``formula`` compiled; forward and backward become fused kernels.

    Also in sight of a mode that watches operations, as full recomputation has one: torch would silently run the formula
    step by step there.
    """
    from torch._dynamo import config as limits  # takes a second to import, which CPU runs need not wait for

    # One row or several, one token or several, each width of heads, each dtype: more kinds than the eight after which
    # torch would run a formula uncompiled.
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
    """Return ``formula`` as the backend computes it on a device."""
    return ELEMENTWISE.choose(backend, device_type)(formula)


def with_kernel(shown: str, formula: Callable[..., Any], kernel: str) -> Operation:
    """Return the operation that computes ``formula``, by a Triton kernel of our own where there is a GPU.

    The kernel is no faster than the compiled formula, but a compiled call costs the host four times a launch, and a
    layer split over ranks waits for its host.

    Args:
        shown: what it is called where a choice is logged.
        formula: the reference.
        kernel: ``module:function`` of the same signature, imported when it is first chosen.
    """

    def load() -> Callable[..., Any]:
        module, _, name = kernel.partition(":")
        return getattr(importlib.import_module(module), name)

    return Operation(
        "elementwise",
        [
            Backend("triton", load, triton_unavailable),
            Backend("compiled", lambda: compiled(formula), needs_gpu),
            Backend("reference", lambda: formula, anywhere),
        ],
        shown=shown,
    )
