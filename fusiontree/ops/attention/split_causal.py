"""Causal attention of a row's last tokens to the full row, by kernels that support only squares and rectangles.

The scores of the keys before the queries form a rectangle without a mask, those of the queries' own tokens a causal
square. Each part yields outputs and the logarithm of its softmax sum (lse); the average of the parts' outputs, weighted
by their softmax sums, is the result (Milakov and Gimelshein 2018). Given the merged output and lse, a backward kernel
computes the probabilities of the full row, so the gradients of the parts add up.

Shape legend: B rows, S queries, T keys, H query heads, K key/value heads, D channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusiontree.ops.elementwise import with_kernel

_ATEN = torch.ops.aten
_HALF = (torch.bfloat16, torch.float16)


def can_attend_in_parts(q_BHSD: Tensor) -> bool:
    """Return True if kernels exist for these queries: 16-bit dtypes on GPUs, any dtype on the CPU."""
    return q_BHSD.device.type == "cpu" or (q_BHSD.device.type == "cuda" and q_BHSD.dtype in _HALF)


def causal_suffix_attention(q_BHSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float | None) -> Tensor:
    """Return ``[B, H, S, D]``: query i of the last S tokens sees keys 0 to T - S + i; T > S.

    H is a multiple of K on GPUs and equal to K on the CPU.
    """
    return _CausalTail.apply(q_BHSD, k_BKTD, v_BKTD, scale)


class _CausalTail(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float | None) -> Tensor:
        before = k_BKTD.shape[2] - q_BHSD.shape[2]
        outputs, lses, others = [], [], []
        for keys, values, causal in _parts(k_BKTD, v_BKTD, before):
            out_BHSD, lse, *rest = _forward(q_BHSD, keys, values, causal, scale)
            outputs.append(out_BHSD)
            lses.append(lse.view(*out_BHSD.shape[:3], 1))
            others.append(rest)
        merge = MERGED.choose("auto", q_BHSD.device.type)
        out_BHSD, lse_BHS1 = merge(*outputs, *lses)
        ctx.save_for_backward(q_BHSD, k_BKTD, v_BKTD, out_BHSD, lse_BHS1.view_as(lse))
        ctx.before, ctx.scale, ctx.others = before, scale, others
        return out_BHSD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_BHSD, k_BKTD, v_BKTD, out_BHSD, lse = ctx.saved_tensors
        dq: list[Tensor] = []
        dk: list[Tensor] = []
        dv: list[Tensor] = []
        for (keys, values, causal), rest in zip(_parts(k_BKTD, v_BKTD, ctx.before), ctx.others, strict=True):
            tensors = (grads[0], q_BHSD, keys, values, out_BHSD, lse)
            found = _backward(*tensors, rest=rest, causal=causal, scale=ctx.scale)
            for of_all, of_part in zip((dq, dk, dv), found, strict=True):
                of_all.append(of_part)
        return dq[0] + dq[1], torch.cat(dk, dim=2), torch.cat(dv, dim=2), None


def _merged(out_0: Tensor, out_1: Tensor, lse_0: Tensor, lse_1: Tensor) -> tuple[Tensor, Tensor]:
    """Return the merged output and lse; outputs ``[B, H, S, D]``, lse ``[B, H, S, 1]`` in fp32."""
    lse = torch.logaddexp(lse_0, lse_1)
    out = out_0.float() * (lse_0 - lse).exp() + out_1.float() * (lse_1 - lse).exp()
    return out.to(out_0.dtype), lse


MERGED = with_kernel("merged attention", _merged, "fusiontree.ops.attention.merge_triton:merged")


def _parts(k_BKTD: Tensor, v_BKTD: Tensor, before: int) -> list[tuple[Tensor, Tensor, bool]]:
    """Return keys, values and the causal flag of the rectangle and of the square."""
    return [
        (k_BKTD[:, :, :before], v_BKTD[:, :, :before], False),
        (k_BKTD[:, :, before:], v_BKTD[:, :, before:], True),
    ]


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> tuple[Any, ...]:
    """Return outputs, lse and further arguments of the backward kernel."""
    if q.device.type == "cpu":  # for tests of this module
        return _ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    if _has_cudnn(q):
        return _ATEN._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return _ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)


def _backward(*tensors: Tensor, rest: list[Any], causal: bool, scale: float | None) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v from (gradient of the output, q, k, v, output, lse)."""
    if tensors[0].device.type == "cpu":
        return _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, 0.0, causal, scale=scale)
    *lengths, seed, offset, _ = rest
    if _has_cudnn(tensors[0]):
        return _ATEN._scaled_dot_product_cudnn_attention_backward(
            *tensors, seed, offset, None, *lengths, 0.0, causal, scale=scale
        )
    return _ATEN._scaled_dot_product_flash_attention_backward(
        *tensors, *lengths, 0.0, causal, seed, offset, scale=scale
    )


def _has_cudnn(tensor: Tensor) -> bool:
    """Return True if cuDNN's kernels, the fastest in torch, run on the device: compute capability 9.0 or newer."""
    return torch.cuda.get_device_capability(tensor.device) >= (9, 0)
