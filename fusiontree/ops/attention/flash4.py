"""flash-attn-4's kernels as torch operations, so that a TorchDispatchMode (activation checkpointing) sees them.

The operations and the autograd function are registered without ``torch.library.custom_op``: with its autograd support,
a forward call costs the host nearly three times as much (116 us instead of 43 us, measured with empty kernels).

Shape legend: as in the package: ``[B, S, H, D]``, or ``[N, H, D]`` for packed sequences.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("fusiontree", "FRAGMENT")
_WHERE = "Tensor? starts_q, Tensor? starts_k, int longest_q, int longest_k, int left, float? scale"


def flash4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    longest_q: int,
    longest_k: int,
    left: int,
    scale: float | None,
) -> Tensor:
    """Compute causal attention; the last query of a sequence is aligned with its last key.

    Args:
        q: queries; the last stride must be 1, other strides multiples of 8.
        k: keys.
        v: values.
        starts_q: starts of sequences among packed queries, followed by the number of queries; int32. None: each row is
            a sequence.
        starts_k: starts of sequences among packed keys, followed by the number of keys; int32.
        longest_q: upper bound of the queries in a sequence; 0 without ``starts_q``.
        longest_k: upper bound of the keys in a sequence.
        left: number of keys before its own key that a query sees; all if negative.
        scale: factor on the scores; None means 1 / sqrt(D).

    Returns:
        Outputs in the shape of ``q``.
    """
    return _Flash4.apply(q, k, v, starts_q, starts_k, longest_q, longest_k, left, scale)


class _Flash4(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *where: Any) -> Tensor:
        *_, left, _ = where
        out, lse = (ALL_BEFORE if left < 0 else IN_WINDOW)(q, k, v, *where)
        starts_q, starts_k, *ctx.others = where
        ctx.save_for_backward(q, k, v, out, lse, starts_q, starts_k)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients = torch.ops.fusiontree.flash4_backward(grads[0], *ctx.saved_tensors, *ctx.others)
        return (*gradients, None, None, None, None, None, None)


@functools.cache
def _package() -> Any:
    from flash_attn.cute import interface

    return interface


def _arguments(
    starts_q: Tensor | None, starts_k: Tensor | None, longest_q: int, longest_k: int, left: int, scale: float | None
) -> dict[str, Any]:
    return {
        "softmax_scale": scale,
        "causal": True,
        "window_size_left": left if left >= 0 else None,
        "cu_seqlens_q": starts_q,
        "cu_seqlens_k": starts_k,
        "max_seqlen_q": longest_q or None,
        "max_seqlen_k": longest_k or None,
    }


def _forward(q: Tensor, k: Tensor, v: Tensor, *where: Any) -> tuple[Tensor, Tensor]:
    return _package()._flash_attn_fwd(q, k, v, return_lse=True, **_arguments(*where))[:2]


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *where: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _package()._flash_attn_bwd(q, k, v, out, dout, lse, **_arguments(*where))[:3]


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *where: Any) -> tuple[Tensor, Tensor]:
    heads_first = (0, 2, 1) if q.dim() == 4 else (1, 0)
    lse = q.new_empty([q.shape[i] for i in heads_first], dtype=torch.float32)
    return q.new_empty(q.shape), lse


def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _define(name: str, tensors: str, results: int, run: Any, fake: Any) -> None:
    given = ", ".join(f"Tensor {t}" for t in tensors.split())
    _LIBRARY.define(f"{name}({given}, {_WHERE}) -> ({', '.join(['Tensor'] * results)})")
    for device in ("CUDA", "CPU"):  # CPU: for tests with a fake package
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"fusiontree::{name}", fake, lib=_LIBRARY)


# One function, two names: activation checkpointing mode ``full`` keeps the outputs of attention without a window and
# recomputes windowed attention.
_define("flash4_all_before", "q k v", 2, _forward, _fake_forward)
_define("flash4_window", "q k v", 2, _forward, _fake_forward)
_define("flash4_backward", "dout q k v out lse", 3, _backward, _fake_backward)
ALL_BEFORE = torch.ops.fusiontree.flash4_all_before.default
IN_WINDOW = torch.ops.fusiontree.flash4_window.default
