"""Gate mix and sums of gate statistics: one Triton kernel each for forward and backward (GPU).

Shape legend: B rows, S tokens, C channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusiontree.ops.elementwise import compiled
from fusiontree.ops.gate import reference
from fusiontree.ops.gate.reference import GivenBranches

_BLOCK = {"TOKENS": 4, "BC": 1024, "num_warps": 4}  # tokens and channels per program
_KINDS = ("both", "first", "second")


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _place(length, channels, TOKENS: tl.constexpr, BC: tl.constexpr):
    """Return a program's row, tokens within the row, channels, tokens within the batch, and a mask of valid ones."""
    row = tl.program_id(1).to(tl.int64)
    columns = tl.cdiv(channels, BC)
    t = tl.program_id(0) // columns * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(0) % columns * BC + tl.arange(0, BC)
    return row, t, c, row * length + t.to(tl.int64), (t[:, None] < length) & (c[None, :] < channels)


@triton.jit
def _mix_forward(
    logits_ptr, branches_ptr, counted_ptr, mixed_ptr, sums_ptr, length, channels, width,
    kind: tl.constexpr, padded: tl.constexpr, TOKENS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row, t, c, token, mask = _place(length, channels, TOKENS, BC)
    logits = tl.load(logits_ptr + token[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
    gate = tl.sigmoid(logits)
    first = tl.load(branches_ptr + token[:, None] * width + c[None, :], mask=mask, other=0.0).to(tl.float32)
    if kind == 0:
        second = tl.load(branches_ptr + token[:, None] * width + channels + c[None, :], mask=mask, other=0.0)
        mixed = gate * first + (1.0 - gate) * second.to(tl.float32)
    elif kind == 1:
        mixed = gate * first
    else:
        mixed = (1.0 - gate) * first
    tl.store(mixed_ptr + token[:, None] * channels + c[None, :], mixed.to(mixed_ptr.dtype.element_ty), mask=mask)
    weight = tl.where(mask, 1.0, 0.0)
    if padded:
        weight *= tl.load(counted_ptr + token, mask=t < length, other=0).to(tl.float32)[:, None]
    part = row * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums_ptr + part * 3, tl.sum(tl.sum(gate * weight, 1), 0))
    tl.store(sums_ptr + part * 3 + 1, tl.sum(tl.sum((_softplus(logits) - logits * gate) * weight, 1), 0))
    tl.store(sums_ptr + part * 3 + 2, tl.sum(tl.sum(gate * gate * weight, 1), 0))


@triton.jit
def _mix_backward(
    logits_ptr, branches_ptr, counted_ptr, dmixed_ptr, dgate_ptr, dentropy_ptr, dsquare_ptr, dlogits_ptr, dbranches_ptr,
    length, channels, width,
    kind: tl.constexpr, padded: tl.constexpr, TOKENS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row, t, c, token, mask = _place(length, channels, TOKENS, BC)
    own = token[:, None] * channels + c[None, :]
    pair = token[:, None] * width + c[None, :]
    logits = tl.load(logits_ptr + own, mask=mask, other=0.0).to(tl.float32)
    dmixed = tl.load(dmixed_ptr + own, mask=mask, other=0.0).to(tl.float32)
    gate = tl.sigmoid(logits)
    # d softplus(l) - l g = -l dg, and dg = g (1 - g) dl.
    dgate = tl.load(dgate_ptr + row) + 2.0 * gate * tl.load(dsquare_ptr + row) - logits * tl.load(dentropy_ptr + row)
    if padded:
        dgate *= tl.load(counted_ptr + token, mask=t < length, other=0).to(tl.float32)[:, None]
    first = tl.load(branches_ptr + pair, mask=mask, other=0.0).to(tl.float32)
    if kind == 0:
        second = tl.load(branches_ptr + pair + channels, mask=mask, other=0.0).to(tl.float32)
        dgate += dmixed * (first - second)
        tl.store(dbranches_ptr + pair, (dmixed * gate).to(dbranches_ptr.dtype.element_ty), mask=mask)
        rest = (dmixed * (1.0 - gate)).to(dbranches_ptr.dtype.element_ty)
        tl.store(dbranches_ptr + pair + channels, rest, mask=mask)
    elif kind == 1:
        dgate += dmixed * first
        tl.store(dbranches_ptr + pair, (dmixed * gate).to(dbranches_ptr.dtype.element_ty), mask=mask)
    else:
        dgate -= dmixed * first
        tl.store(dbranches_ptr + pair, (dmixed * (1.0 - gate)).to(dbranches_ptr.dtype.element_ty), mask=mask)
    tl.store(dlogits_ptr + own, (gate * (1.0 - gate) * dgate).to(dlogits_ptr.dtype.element_ty), mask=mask)


def mix(logits_BSC: Tensor, branches_BSC: Tensor, given: GivenBranches) -> Tensor:
    """Compute :func:`fusiontree.ops.gate.reference.mix`; bitwise equal to the mix of :func:`mix_and_sums`."""
    return mix_and_sums(logits_BSC, branches_BSC, None, given)[0]


def mix_and_sums(
    logits_BSC: Tensor, branches_BSC: Tensor, counted_BS: Tensor | None, given: GivenBranches
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute :func:`fusiontree.ops.gate.reference.mix_and_sums`; float64 uses the compiled formula."""
    if logits_BSC.dtype == torch.float64:
        return compiled(reference.mix_and_sums)(logits_BSC, branches_BSC, counted_BS, given)
    logits, branches = logits_BSC.contiguous(), branches_BSC.contiguous()
    mixed_BSC = torch.empty(logits.shape, dtype=branches.dtype, device=logits.device)
    grid = _grid(logits)
    sums = torch.empty(grid[1], grid[0], 3, dtype=torch.float32, device=logits.device)
    _mix_forward[grid](
        logits, branches, logits if counted_BS is None else counted_BS.contiguous(), mixed_BSC, sums,
        *logits.shape[1:], branches.shape[2], kind=_KINDS.index(given), padded=counted_BS is not None, **_BLOCK,
    )  # fmt: skip
    gate_B, entropy_B, square_B = sums.sum(1).unbind(1)
    return mixed_BSC, gate_B, entropy_B, square_B


def gradients(
    logits_BSC: Tensor,
    branches_BSC: Tensor,
    counted_BS: Tensor | None,
    grads: tuple[Tensor, ...],
    given: GivenBranches,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`fusiontree.ops.gate.reference.gradients`; float64 uses the compiled formula."""
    if logits_BSC.dtype == torch.float64:
        return compiled(reference.gradients)(logits_BSC, branches_BSC, counted_BS, grads, given)
    logits, branches = logits_BSC.contiguous(), branches_BSC.contiguous()
    dlogits, dbranches = torch.empty_like(logits), torch.empty_like(branches)
    _mix_backward[_grid(logits)](
        logits, branches, logits if counted_BS is None else counted_BS.contiguous(), grads[0].contiguous(),
        *(grad_B.float().contiguous() for grad_B in grads[1:]),
        dlogits, dbranches, *logits.shape[1:], branches.shape[2],
        kind=_KINDS.index(given), padded=counted_BS is not None, **_BLOCK,
    )  # fmt: skip
    return dlogits, dbranches


def _grid(logits_BSC: Tensor) -> tuple[int, int]:
    """Return the grid, with tokens and channels on axis 0: other axes are limited to 65,535 programs (256K tokens)."""
    rows, length, channels = logits_BSC.shape
    return triton.cdiv(channels, _BLOCK["BC"]) * triton.cdiv(length, _BLOCK["TOKENS"]), rows
