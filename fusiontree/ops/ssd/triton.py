"""The scan by this project's Triton kernels (GPU): three launches forward, six backward, no autotuning.

Shape legend: B rows, S tokens, T tokens padded to whole chunks, c chunks, Q tokens of a chunk, H heads, G groups,
P channels of a head, N state size.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fusiontree.ops.ssd import kernels, kernels_backward
from fusiontree.ops.ssd.exchange import Exchange
from fusiontree.ops.ssd.reference import ScanInputs, ssd_reference
from fusiontree.ops.ssd.sizes import STATES, WIDTHS, ScanSizes

log = logging.getLogger(__name__)

_INPUTS = {"num_warps": 4, "num_stages": 1}
"""Launch options of the kernel that has no registers left to prefetch."""


def ssd_triton(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Compute :func:`fusiontree.ops.ssd.ssd_scan`; float64 and unsupported sizes use the next backend.

    The kernels choose the chunk size; ``chunk_size`` is ignored and would not change the result.
    """
    x_BSHP = inputs.x_BSHP
    sizes = ScanSizes.of(x_BSHP, inputs.B_BSGN)
    if sizes is not None:
        return _Scan.apply(sizes, *inputs.for_kernels())
    if x_BSHP.dtype == torch.float64:
        return ssd_reference(inputs)
    return _without_kernels(x_BSHP.shape[-1], inputs.B_BSGN.shape[-1], x_BSHP.device)(inputs)


@functools.cache
def _without_kernels(width: int, size: int, device: torch.device) -> Callable:
    """Return the next backend that supports these sizes; logs once per (``width``, ``size``)."""
    from fusiontree.ops.ssd import SSD

    others = (backend for name, backend in SSD.backends.items() if name != "triton")
    other = next(backend for backend in others if backend.unavailable(device) is None)
    log.warning(
        "kernels.ssd=triton has no kernel for mamba.head_dim %d and d_state %d in this precision on this device; using "
        "backend %s, which is slower. Supported: model.mamba.head_dim of %s and d_state of %s",
        width, size, other.name, ", ".join(map(str, WIDTHS)), ", ".join(map(str, STATES)),
    )  # fmt: skip
    return other.load()


class _Saved(NamedTuple):
    """Tensors of one scan that its kernels share, kept for the backward pass."""

    x_BSHP: Tensor
    A_H: Tensor
    B_BSGN: Tensor
    C_BSGN: Tensor
    D_H: Tensor
    segments_BS: Tensor | None
    decay_BHT: Tensor
    step_BHT: Tensor
    states_BcHPN: Tensor | None = None
    """State before every chunk."""

    @property
    def packed(self) -> bool:
        """True if documents start inside rows."""
        return self.segments_BS is not None

    @property
    def per_token(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log decays, steps and segments, in the order in which all kernels take them."""
        return self.decay_BHT, self.step_BHT, _or(self.segments_BS, self.x_BSHP)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sizes: ScanSizes, *arguments: Any) -> tuple[Tensor, Tensor]:
        inputs = ScanInputs(*arguments)
        x_BSHP, B_BSGN, C_BSGN = (_side_by_side(t) for t in (inputs.x_BSHP, inputs.B_BSGN, inputs.C_BSGN))
        dt_BSH = inputs.dt_BSH if inputs.dt_BSH.stride(-1) == 1 else inputs.dt_BSH.contiguous()
        decay_BHT, step_BHT = x_BSHP.new_empty(
            2, sizes.rows, sizes.heads, sizes.chunks * sizes.Q, dtype=torch.float32
        ).unbind()
        kernels.chunk_decay[(sizes.chunks, triton.cdiv(sizes.heads, 16), sizes.rows)](
            dt_BSH, inputs.A_H, decay_BHT, step_BHT, *dt_BSH.stride()[:2], *sizes.extents[:3], Q=sizes.Q, BH=16
        )
        saved = _Saved(x_BSHP, inputs.A_H, B_BSGN, C_BSGN, inputs.D_H, inputs.segments_BS, decay_BHT, step_BHT)
        states_BcHPN, final_BHPN, kept_BHc, total_BH = _walk(sizes, saved, x_BSHP, B_BSGN, inputs.initial_state_BHPN)
        exchange = None
        if inputs.state_exchange is not None:
            reachable_BH = torch.zeros_like(total_BH) if inputs.whole_rows else total_BH
            exchange = Exchange(inputs.state_exchange, final_BHPN, reachable_BH)
            if not inputs.whole_rows:  # a row of one document must not see a state from before its start
                _add(sizes, states_BcHPN, exchange.initial_BHPN, kept_BHc)
                final_BHPN = torch.addcmul(final_BHPN, total_BH[..., None, None], exchange.initial_BHPN.float())
        y_BSHP = _empty_like(x_BSHP)
        kernels.chunk_outputs[sizes.grid](
            x_BSHP, B_BSGN, C_BSGN, inputs.D_H, *saved.per_token, states_BcHPN, y_BSHP,
            *_strides(x_BSHP, B_BSGN, C_BSGN), *sizes.extents,
            packed=saved.packed, **sizes.tile, HEADS=sizes.heads_per_program, **sizes.launch(8),
        )  # fmt: skip
        ctx.save_for_backward(*saved._replace(states_BcHPN=states_BcHPN))
        ctx.sizes, ctx.exchange, ctx.whole_rows = sizes, exchange, inputs.whole_rows
        ctx.has_initial = inputs.initial_state_BHPN is not None
        ctx.set_materialize_grads(False)
        return y_BSHP, final_BHPN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        sizes, exchange, saved = ctx.sizes, ctx.exchange, _Saved(*ctx.saved_tensors)
        dy_BSHP, dfinal_BHPN = grads
        dy_BSHP = torch.zeros_like(saved.x_BSHP) if dy_BSHP is None else _side_by_side(dy_BSHP)
        # Gradient of each chunk's decay factor, as partial sums of :func:`chunk_walk`.
        dkeep_BHcnP = saved.x_BSHP.new_empty(
            sizes.rows, sizes.heads, sizes.chunks, sizes.size // sizes.columns, sizes.width, dtype=torch.float32
        )
        back = (saved.states_BcHPN, dkeep_BHcnP)
        dstates_BcHPN, dinitial_BHPN, kept_BHc, _ = _walk(sizes, saved, dy_BSHP, saved.C_BSGN, dfinal_BHPN, back)
        more_BH = None
        if exchange is not None:
            # A collective call: ranks that ignore their initial state take part too.
            dreached_BHPN, more_BH = exchange.backward(dinitial_BHPN.zero_() if ctx.whole_rows else dinitial_BHPN)
            _add(sizes, dstates_BcHPN, dreached_BHPN, kept_BHc, back)
        gradients = _chunk_gradients(sizes, saved, dy_BSHP, dstates_BcHPN, dkeep_BHcnP, more_BH)
        return None, *gradients, None, None, dinitial_BHPN if ctx.has_initial else None, None


def _chunk_gradients(
    sizes: ScanSizes,
    saved: _Saved,
    dy_BSHP: Tensor,
    dstates_BcHPN: Tensor,
    dkeep_BHcnP: Tensor,
    more_BH: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return the gradients of x, dt, A, B, C and D, from those of y, of the states and of each chunk's decay.

    ``more``: addend to the gradient of every chunk's log decay, from a state exchange.
    """
    x_BSHP, B_BSGN, C_BSGN = saved.x_BSHP, saved.B_BSGN, saved.C_BSGN
    dx_BSHP = _empty_like(x_BSHP)
    # Side by side, as in the projection of B and C, which then needs no copy of its gradient.
    dB_BSGN, dC_BSGN = B_BSGN.new_empty(*B_BSGN.shape[:2], 2, *B_BSGN.shape[2:]).unbind(2)
    dscores = x_BSHP.new_empty(sizes.rows, sizes.chunks, sizes.groups * sizes.blocks, sizes.Q, sizes.Q)
    dstep, ddecay, dlater, to_state, from_state, skip = x_BSHP.new_empty(
        6, *saved.step_BHT.shape, dtype=torch.float32
    ).unbind()
    shape = (*_strides(x_BSHP, dy_BSHP, B_BSGN, C_BSGN), *sizes.extents)
    programs, *others = sizes.grid
    grid = (2 * programs, *others)
    constants = {"packed": saved.packed, **sizes.tile}
    kernels_backward.chunk_inputs_backward[grid](
        x_BSHP, dy_BSHP, B_BSGN, C_BSGN, saved.D_H, *saved.per_token, dstates_BcHPN,
        dx_BSHP, dstep, to_state, skip, *shape, **constants, HEADS=sizes.heads_per_program, **_INPUTS,
    )  # fmt: skip
    kernels_backward.chunk_scores_backward[grid](
        x_BSHP, dy_BSHP, B_BSGN, C_BSGN, *saved.per_token, dscores, ddecay, dlater, *shape,
        **constants, HEADS=sizes.heads_per_program, **sizes.launch(4),
    )  # fmt: skip
    for of_C in (True, False):
        x, w, other = (dy_BSHP, C_BSGN, B_BSGN) if of_C else (x_BSHP, B_BSGN, C_BSGN)
        kernels_backward.chunk_group_backward[(sizes.groups, sizes.chunks, sizes.rows)](
            x, w, other, *saved.per_token, saved.states_BcHPN if of_C else dstates_BcHPN, dscores,
            dC_BSGN if of_C else dB_BSGN, from_state, *_strides(x, w, other), *dB_BSGN.stride()[:2],
            *sizes.extents, sizes.blocks,
            of_C=of_C, **constants, **sizes.launch(8),
        )  # fmt: skip
    ddt_BSH = x_BSHP.new_empty(x_BSHP.shape[:3], dtype=torch.float32)
    dA_BcH = x_BSHP.new_empty(sizes.rows, sizes.chunks, sizes.heads, dtype=torch.float32)
    decay_BHT, step_BHT, segments = saved.per_token
    kernels_backward.chunk_decay_backward[(sizes.chunks, triton.cdiv(sizes.heads, 16), sizes.rows)](
        ddecay, dlater, from_state, to_state, dstep, dkeep_BHcnP, _or(more_BH, x_BSHP), decay_BHT, step_BHT,
        saved.A_H, segments, ddt_BSH, dA_BcH, *sizes.extents[:3],
        has_more=more_BH is not None, packed=saved.packed, Q=sizes.Q, BH=16, PARTS=dkeep_BHcnP[0, 0, 0].numel(),
    )  # fmt: skip
    return dx_BSHP, ddt_BSH, dA_BcH.sum((0, 1)), dB_BSGN, dC_BSGN, skip.sum((0, 2))


def _walk(
    sizes: ScanSizes,
    saved: _Saved,
    x_BSHP: Tensor,
    w_BSGN: Tensor,
    begin_BHPN: Tensor | None,
    back: tuple[Tensor | None, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run :func:`chunk_walk`.

    Returns the states ``[B, c, H, P, N]``, the final state (fp32), and the factors with which ``begin`` enters each
    state and the final state. ``back`` is given for the backward walk: the states, and the output for ``dkeep``.
    """
    shape = (sizes.rows, sizes.heads, sizes.width, sizes.size)
    states_BcHPN = x_BSHP.new_empty(sizes.rows, sizes.chunks, *shape[1:])
    end_BHPN = x_BSHP.new_empty(shape, dtype=torch.float32)
    kept_BHc = x_BSHP.new_empty(*shape[:2], sizes.chunks, dtype=torch.float32)
    total_BH = x_BSHP.new_empty(shape[:2], dtype=torch.float32)
    begin = _or(None if begin_BHPN is None else begin_BHPN.contiguous(), end_BHPN)
    kernels.chunk_walk[(sizes.size // sizes.columns, sizes.heads, sizes.rows)](
        x_BSHP, w_BSGN, *saved.per_token, begin, states_BcHPN, end_BHPN, kept_BHc, total_BH,
        *(back or (states_BcHPN, end_BHPN)), *_strides(x_BSHP, w_BSGN), *sizes.extents,
        backward=back is not None, has_begin=begin_BHPN is not None, packed=saved.packed,
        **sizes.tile, BN=sizes.columns, **sizes.launch(4),
    )  # fmt: skip
    return states_BcHPN, end_BHPN, kept_BHc, total_BH


def _add(
    sizes: ScanSizes,
    states_BcHPN: Tensor,
    begin_BHPN: Tensor,
    kept_BHc: Tensor,
    back: tuple[Tensor | None, Tensor] | None = None,
) -> None:
    """Add the contribution of ``begin`` to the states of a walk from zero; ``back`` as in :func:`_walk`."""
    before_BcHPN, dkeep_BHcnP = back or (states_BcHPN, kept_BHc)
    kernels.chunk_add_state[(sizes.chunks, sizes.heads, sizes.rows)](
        states_BcHPN, begin_BHPN.float().contiguous(), kept_BHc, before_BcHPN, dkeep_BHcnP, sizes.chunks, sizes.heads,
        dkeep_BHcnP[0, 0, 0].numel(), backward=back is not None, SIZE=sizes.width * sizes.size, num_warps=8,
    )  # fmt: skip


def _strides(*tensors: Tensor) -> list[int]:
    """Return the strides of rows, tokens and heads (or groups) of each tensor."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _empty_like(tensor: Tensor) -> Tensor:
    """Return an uninitialized contiguous tensor."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _side_by_side(tensor: Tensor) -> Tensor:
    """Return ``tensor`` with contiguous heads (or groups) and channels; a slice of a wider projection is not copied."""
    fits = tensor.stride(3) == 1 and (tensor.stride(2) == tensor.shape[3] or tensor.shape[2] == 1)
    return tensor if fits else tensor.contiguous()


def _or(tensor: Tensor | None, unused: Tensor) -> Tensor:
    """Return ``tensor``, or ``unused`` as a placeholder pointer that the kernel does not read."""
    return unused if tensor is None else tensor
