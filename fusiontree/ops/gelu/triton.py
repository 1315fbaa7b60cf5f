"""GELU and its gradient by one Triton kernel (GPU). Shape legend: B rows, S tokens, C channels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusiontree.ops.elementwise import compiled
from fusiontree.ops.gelu import reference

_BLOCK = {"BLOCK": 2048, "num_warps": 8}  # elements per program


@triton.jit
def _again_and_gradient(x_ptr, dy_ptr, y_ptr, dx_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)  # normal distribution: probability below x, and density at x
    density = tl.exp(-0.5 * x * x) * 0.3989422804014327
    tl.store(y_ptr + at, (x * below).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(dx_ptr + at, (dy * (below + x * density)).to(dx_ptr.dtype.element_ty), mask=inside)


def again_and_gradient(x_BSC: Tensor, dy_BSC: Tensor) -> tuple[Tensor, Tensor]:
    """Compute :func:`fusiontree.ops.gelu.reference.again_and_gradient`; float64 uses the compiled formula."""
    if x_BSC.dtype == torch.float64:
        return compiled(reference.again_and_gradient)(x_BSC, dy_BSC)
    x, dy = x_BSC.contiguous(), dy_BSC.contiguous()
    y, dx = torch.empty_like(x), torch.empty_like(x)
    count = x.numel()
    _again_and_gradient[(triton.cdiv(count, _BLOCK["BLOCK"]),)](x, dy, y, dx, count, **_BLOCK)
    return y, dx
