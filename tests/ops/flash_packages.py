"""Stand-ins for the flash-attn packages: their functions, computed plainly from what their documentation says."""

from __future__ import annotations

import math
import sys
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fusiontree.ops.attention import flash4


def install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> ModuleType:
    """Put a module, and the packages it lies in, where ``import`` finds them."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        module = ModuleType(path)
        module.__spec__ = ModuleSpec(path, None, is_package=end < len(parts))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, path, module)
        if end > 1:
            setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], module)
    vars(module).update(contents)
    return module


def one_sequence(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window: tuple[int | None, int | None]
) -> tuple[Tensor, Tensor]:
    """Outputs ``[S, H, D]`` and lse ``[H, S]`` of one sequence; the last query is in line with the last key."""
    left, right = (-1 if side is None else side for side in window)
    if causal:
        right = 0
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    place = torch.arange(q.shape[0]).unsqueeze(1) + k.shape[0] - q.shape[0]
    distance = place - torch.arange(k.shape[0])
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if right >= 0:
        hidden |= distance < -right
    if left >= 0:
        hidden |= distance > left
    scores = torch.einsum("shd,thd->hst", q, k) * (scale or 1 / math.sqrt(q.shape[-1]))
    scores = scores.masked_fill(hidden, -math.inf)
    return torch.einsum("hst,thd->shd", scores.softmax(-1), v), scores.logsumexp(-1)


def sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    causal: bool,
    window: tuple[int | None, int | None],
    starts_q: Tensor | None = None,
    starts_k: Tensor | None = None,
    longest_q: int | None = None,
    longest_k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs and lse of all sequences, laid out as flash-attn does."""
    if starts_q is None:
        found = [one_sequence(*row, scale, causal, window) for row in zip(q, k, v, strict=True)]
        return torch.stack([out for out, _ in found]), torch.stack([lse for _, lse in found])
    assert starts_k is not None and longest_q is not None and longest_k is not None
    assert starts_q.dtype == starts_k.dtype == torch.int32
    assert (int(starts_q[-1]), int(starts_k[-1])) == (len(q), len(k))
    lengths_q, lengths_k = starts_q.diff().tolist(), starts_k.diff().tolist()
    assert min(lengths_q + lengths_k) >= 0
    assert max(lengths_q) <= longest_q and max(lengths_k) <= longest_k
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    found = [one_sequence(*part, scale, causal, window) for part in parts]
    return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found], dim=1)


class Flash4:
    """flash-attn-4: its inner functions, and the windows that its forward was called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forwards: list[int | None] = []
        inner = {"_flash_attn_fwd": self.forward, "_flash_attn_bwd": self.backward}
        install(monkeypatch, "flash_attn.cute.interface", **inner)
        monkeypatch.setattr(metadata, "version", {"flash-attn-4": "4.0.0b36"}.__getitem__)
        monkeypatch.setattr(flash4, "_package", flash4._package.__wrapped__)  # which remembers what it imported

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, window_size_left: int | None, **kind: Any
    ) -> tuple[Any, ...]:
        self.forwards.append(window_size_left)
        out, lse = sequences(q, k, v, **_named(window_size_left, kind))
        return out, lse if return_lse else None, None, None, None

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor,
        *, window_size_left: int | None, **kind: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        with torch.enable_grad():
            leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
            again, sums = sequences(leaves[0], leaves[1], leaves[2], **_named(window_size_left, kind))
            torch.testing.assert_close((out, lse), (again.detach(), sums.detach()))
            return torch.autograd.grad(again, leaves, dout, materialize_grads=True)


def _named(left: int | None, kind: dict[str, Any]) -> dict[str, Any]:
    names = {"softmax_scale": "scale", "cu_seqlens_q": "starts_q", "cu_seqlens_k": "starts_k"}
    names |= {"max_seqlen_q": "longest_q", "max_seqlen_k": "longest_k", "causal": "causal"}
    return {"window": (left, None)} | {names[name]: value for name, value in kind.items()}


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """torch's function: causal only as the window says."""
    assert enable_gqa
    return sequences(query, key, value, scale, False, window_size, cu_seq_q, cu_seq_k, max_q, max_k)[0]
