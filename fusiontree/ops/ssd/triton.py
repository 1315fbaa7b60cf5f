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

from fusiontree.ops.documents import Documents
from fusiontree.ops.ssd import kernels, kernels_backward
from fusiontree.ops.ssd.chunked import ssd_chunked
from fusiontree.ops.ssd.exchange import Exchange

log = logging.getLogger(__name__)

_WIDTHS, _STATES = (16, 32, 64, 128), (16, 32, 64, 128, 256)
"""Supported channels per head and state sizes: powers of two with tiles that fit into a multiprocessor."""
_HEADS_A_PROGRAM = 8
_ENOUGH = 128
"""Number of programs that keep a large GPU busy."""
_INPUTS = {"num_warps": 4, "num_stages": 1}
"""Launch options of the kernel that has no registers left to prefetch."""
_KIB = 1024


def ssd_triton(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    D_H: Tensor,
    *,
    chunk_size: int,
    documents: Documents | None = None,
    initial_state_BHPN: Tensor | None = None,
    state_exchange: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`fusiontree.ops.ssd.ssd_scan`; float64 and unsupported sizes use the next backend.

    The kernels choose the chunk size; ``chunk_size`` is ignored and would not change the result.
    """
    sizes = _Sizes.of(x_BSHP, B_BSGN)
    if sizes is None:
        width, size = x_BSHP.shape[-1], B_BSGN.shape[-1]
        scan = ssd_chunked if x_BSHP.dtype == torch.float64 else _without_kernels(width, size, x_BSHP.device)
        return scan(
            x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, chunk_size=chunk_size, documents=documents,
            initial_state_BHPN=initial_state_BHPN, state_exchange=state_exchange,
        )  # fmt: skip
    whole_rows = documents is not None and documents.whole_rows
    # Segment 0 continues the initial state.
    segments_BS = None if documents is None else documents.inner_segments_BS
    initial = None if whole_rows or initial_state_BHPN is None else initial_state_BHPN.float()
    return _Scan.apply(
        x_BSHP, dt_BSH.float(), A_H.float(), B_BSGN, C_BSGN, D_H.float(), initial, segments_BS, sizes, whole_rows,
        state_exchange,
    )  # fmt: skip


@functools.cache
def _without_kernels(width: int, size: int, device: torch.device) -> Callable:
    """Return the next backend that supports these sizes; logs once per (``width``, ``size``)."""
    from fusiontree.ops.ssd import SSD

    others = (backend for name, backend in SSD.backends.items() if name != "triton")
    other = next(backend for backend in others if backend.unavailable(device) is None)
    log.warning(
        "kernels.ssd=triton has no kernel for mamba.head_dim %d and d_state %d in this precision on this device; using "
        "backend %s, which is slower. Supported: model.mamba.head_dim of %s and d_state of %s",
        width, size, other.name, ", ".join(map(str, _WIDTHS)), ", ".join(map(str, _STATES)),
    )  # fmt: skip
    return other.load()


def tiles(itemsize: int, width: int, size: int, room: int) -> tuple[int, int] | None:
    """Return the tokens per scan chunk and the number of prefetched loads, or None if no tile fits.

    Chunks of 128 tokens need the registers of Hopper or newer. :func:`chunk_outputs` needs the most shared memory: C of
    a chunk, and x and the state of each prefetched head. Triton 3.6 uses this amount for 16-bit inputs on sm_90, less
    on other GPUs, and at most 0.83 of it for 32-bit inputs.

    Args:
        itemsize: bytes per input value.
        width: channels of a head.
        size: state size of a head.
        room: bytes of shared memory per multiprocessor.
    """
    large = itemsize == 2 and width <= 64 and size <= 128 and room >= 200 * _KIB
    share = 1.0 if itemsize == 2 else 0.85
    for chunk, ahead in ((128, 3), (64, 3), (64, 2), (32, 2)):
        values = max(chunk * size + ahead * (chunk + size) * width, 2 * chunk * size)  # or B and C of a chunk
        need = share * itemsize * values + 4 * _KIB
        if need <= room and (chunk < 128 or large):
            return chunk, ahead
    return None


@functools.cache
def _fast_memory(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 256 * _KIB
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


class _Sizes(NamedTuple):
    """Sizes of one call."""

    rows: int
    length: int
    heads: int
    groups: int
    width: int
    size: int
    Q: int
    ahead: int
    """Number of prefetched loads."""

    @property
    def chunks(self) -> int:
        """Number of chunks per row."""
        return -(-self.length // self.Q)

    @property
    def blocks(self) -> int:
        """Number of programs that share the heads of a group."""
        heads = self.heads // self.groups
        return next(n for n in range(1, heads + 1) if heads % n == 0 and heads // n <= _HEADS_A_PROGRAM)

    @property
    def columns(self) -> int:
        """Columns of the state per program of :func:`chunk_walk`; with fewer columns, inputs are read more often."""
        many = self.rows * self.heads * self.size // 64 >= _ENOUGH
        return min(self.size, 64 if many else 32)

    @property
    def tile(self) -> dict[str, int]:
        """Compile-time constants of the kernels."""
        return {"Q": self.Q, "P": self.width, "N": self.size}

    def launch(self, warps: int) -> dict[str, int]:
        """Return a kernel's launch options."""
        return {"num_warps": warps, "num_stages": self.ahead}

    @classmethod
    def of(cls, x_BSHP: Tensor, B_BSGN: Tensor) -> _Sizes | None:
        """Derive the sizes from the inputs; None if there is no kernel for them."""
        rows, length, heads, width = x_BSHP.shape
        groups, size = B_BSGN.shape[2:]
        if x_BSHP.dtype == torch.float64 or width not in _WIDTHS or size not in _STATES:
            return None
        fitting = tiles(x_BSHP.dtype.itemsize, width, size, _fast_memory(x_BSHP.device))
        return None if fitting is None else cls(rows, length, heads, groups, width, size, *fitting)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BSHP: Tensor,
        dt_BSH: Tensor,
        A_H: Tensor,
        B_BSGN: Tensor,
        C_BSGN: Tensor,
        D_H: Tensor,
        initial_BHPN: Tensor | None,
        segments_BS: Tensor | None,
        sizes: _Sizes,
        whole_rows: bool,
        state_exchange: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        x_BSHP, B_BSGN, C_BSGN = (_side_by_side(t) for t in (x_BSHP, B_BSGN, C_BSGN))
        dt_BSH = dt_BSH if dt_BSH.stride(-1) == 1 else dt_BSH.contiguous()
        decay_BHT, step_BHT = x_BSHP.new_empty(
            2, sizes.rows, sizes.heads, sizes.chunks * sizes.Q, dtype=torch.float32
        ).unbind()
        kernels.chunk_decay[(sizes.chunks, triton.cdiv(sizes.heads, 16), sizes.rows)](
            dt_BSH, A_H, decay_BHT, step_BHT, dt_BSH.stride(0), dt_BSH.stride(1), sizes.length, sizes.chunks,
            sizes.heads, Q=sizes.Q, BH=16,
        )  # fmt: skip
        decays = (decay_BHT, step_BHT, segments_BS)
        states_BcHPN, final_BHPN, kept_BHc, total_BH = _walk(sizes, x_BSHP, B_BSGN, decays, initial_BHPN)
        exchange = None
        if state_exchange is not None:
            exchange = Exchange(state_exchange, final_BHPN, torch.zeros_like(total_BH) if whole_rows else total_BH)
            if not whole_rows:  # a row of one document must not see a state from before its start
                _add(sizes, states_BcHPN, exchange.initial_BHPN, kept_BHc)
                final_BHPN = torch.addcmul(final_BHPN, total_BH[..., None, None], exchange.initial_BHPN.float())
        y_BSHP = torch.empty(x_BSHP.shape, dtype=x_BSHP.dtype, device=x_BSHP.device)
        heads_a_group = sizes.heads // sizes.groups
        kernels.chunk_outputs[(sizes.groups * sizes.blocks, sizes.chunks, sizes.rows)](
            x_BSHP, B_BSGN, C_BSGN, D_H, decay_BHT, step_BHT, _or(segments_BS, x_BSHP), states_BcHPN, y_BSHP,
            *x_BSHP.stride()[:3], *B_BSGN.stride()[:3], *C_BSGN.stride()[:3],
            sizes.length, sizes.chunks, sizes.heads, heads_a_group,
            packed=segments_BS is not None, **sizes.tile, HEADS=heads_a_group // sizes.blocks, **sizes.launch(8),
        )  # fmt: skip
        ctx.save_for_backward(x_BSHP, A_H, B_BSGN, C_BSGN, D_H, segments_BS, decay_BHT, step_BHT, states_BcHPN)
        ctx.sizes, ctx.has_initial, ctx.exchange, ctx.whole_rows = sizes, initial_BHPN is not None, exchange, whole_rows
        ctx.set_materialize_grads(False)
        return y_BSHP, final_BHPN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x_BSHP, A_H, B_BSGN, C_BSGN, D_H, segments_BS, decay_BHT, step_BHT, states_BcHPN = ctx.saved_tensors
        sizes, exchange = ctx.sizes, ctx.exchange
        dy_BSHP, dfinal_BHPN = grads
        dy_BSHP = torch.zeros_like(x_BSHP) if dy_BSHP is None else _side_by_side(dy_BSHP)
        decays = (decay_BHT, step_BHT, segments_BS)
        dkeep_BHcnP = x_BSHP.new_empty(
            sizes.rows, sizes.heads, sizes.chunks, sizes.size // sizes.columns, sizes.width, dtype=torch.float32
        )
        back = (states_BcHPN, dkeep_BHcnP)
        dstates_BcHPN, dinitial_BHPN, kept_BHc, _ = _walk(sizes, dy_BSHP, C_BSGN, decays, dfinal_BHPN, back)
        more_BH = None
        if exchange is not None:
            # A collective call: ranks that ignore their initial state take part too.
            dreached_BHPN, more_BH = exchange.backward(dinitial_BHPN.zero_() if ctx.whole_rows else dinitial_BHPN)
            _add(sizes, dstates_BcHPN, dreached_BHPN, kept_BHc, back)

        heads_a_group, blocks, packed = sizes.heads // sizes.groups, sizes.blocks, segments_BS is not None
        segments = _or(segments_BS, x_BSHP)
        dx_BSHP = torch.empty(x_BSHP.shape, dtype=x_BSHP.dtype, device=x_BSHP.device)
        dB_BSGN, dC_BSGN = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (B_BSGN, C_BSGN))
        dscores = x_BSHP.new_empty(sizes.rows, sizes.chunks, sizes.groups * blocks, sizes.Q, sizes.Q)
        dstep, ddecay, dlater, to_state, from_state, skip = x_BSHP.new_empty(
            6, *step_BHT.shape, dtype=torch.float32
        ).unbind()
        shape = (
            *x_BSHP.stride()[:3], *dy_BSHP.stride()[:3], *B_BSGN.stride()[:3], *C_BSGN.stride()[:3],
            sizes.length, sizes.chunks, sizes.heads, heads_a_group,
        )  # fmt: skip
        grid = (2 * sizes.groups * blocks, sizes.chunks, sizes.rows)
        constants = {"packed": packed, **sizes.tile}
        kernels_backward.chunk_inputs_backward[grid](
            x_BSHP, dy_BSHP, B_BSGN, C_BSGN, D_H, decay_BHT, step_BHT, segments, dstates_BcHPN,
            dx_BSHP, dstep, to_state, skip, *shape, **constants, HEADS=heads_a_group // blocks, **_INPUTS,
        )  # fmt: skip
        kernels_backward.chunk_scores_backward[grid](
            x_BSHP, dy_BSHP, B_BSGN, C_BSGN, decay_BHT, step_BHT, segments, dscores, ddecay, dlater, *shape,
            **constants, HEADS=heads_a_group // blocks, **sizes.launch(4),
        )  # fmt: skip
        for of_C in (True, False):
            x, w, other = (dy_BSHP, C_BSGN, B_BSGN) if of_C else (x_BSHP, B_BSGN, C_BSGN)
            kernels_backward.chunk_group_backward[(sizes.groups, sizes.chunks, sizes.rows)](
                x, w, other, decay_BHT, step_BHT, segments, states_BcHPN if of_C else dstates_BcHPN, dscores,
                dC_BSGN if of_C else dB_BSGN, from_state,
                *x.stride()[:3], *w.stride()[:3], *other.stride()[:3],
                sizes.length, sizes.chunks, sizes.heads, heads_a_group, blocks,
                of_C=of_C, **constants, **sizes.launch(8),
            )  # fmt: skip
        ddt_BSH = x_BSHP.new_empty(x_BSHP.shape[:3], dtype=torch.float32)
        dA_BcH = x_BSHP.new_empty(sizes.rows, sizes.chunks, sizes.heads, dtype=torch.float32)
        kernels_backward.chunk_decay_backward[(sizes.chunks, triton.cdiv(sizes.heads, 16), sizes.rows)](
            ddecay, dlater, from_state, to_state, dstep, dkeep_BHcnP, _or(more_BH, x_BSHP), decay_BHT, step_BHT, A_H,
            segments, ddt_BSH, dA_BcH, sizes.length, sizes.chunks, sizes.heads,
            has_more=more_BH is not None, packed=packed, Q=sizes.Q, BH=16, PARTS=dkeep_BHcnP[0, 0, 0].numel(),
        )  # fmt: skip
        dA_H, dD_H = dA_BcH.sum((0, 1)), skip.sum((0, 2))
        dinitial = dinitial_BHPN if ctx.has_initial else None
        return dx_BSHP, ddt_BSH, dA_H, dB_BSGN, dC_BSGN, dD_H, dinitial, None, None, None, None


def _walk(
    sizes: _Sizes,
    x_BSHP: Tensor,
    w_BSGN: Tensor,
    decays: tuple[Tensor, Tensor, Tensor | None],
    begin_BHPN: Tensor | None,
    back: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run :func:`chunk_walk`.

    Returns the states ``[B, c, H, P, N]``, the final state (fp32), and the factors with which ``begin`` enters each
    state and the final state. ``back`` is given for the backward walk: the states, and the output for ``dkeep``.
    """
    decay_BHT, step_BHT, segments_BS = decays
    shape = (sizes.rows, sizes.heads, sizes.width, sizes.size)
    states_BcHPN = x_BSHP.new_empty(sizes.rows, sizes.chunks, *shape[1:])
    end_BHPN = x_BSHP.new_empty(shape, dtype=torch.float32)
    kept_BHc = x_BSHP.new_empty(*shape[:2], sizes.chunks, dtype=torch.float32)
    total_BH = x_BSHP.new_empty(shape[:2], dtype=torch.float32)
    begin = _or(None if begin_BHPN is None else begin_BHPN.contiguous(), end_BHPN)
    kernels.chunk_walk[(sizes.size // sizes.columns, sizes.heads, sizes.rows)](
        x_BSHP, w_BSGN, decay_BHT, step_BHT, _or(segments_BS, x_BSHP), begin, states_BcHPN, end_BHPN, kept_BHc,
        total_BH, *(back or (states_BcHPN, end_BHPN)), *x_BSHP.stride()[:3], *w_BSGN.stride()[:3],
        sizes.length, sizes.chunks, sizes.heads, sizes.heads // sizes.groups,
        backward=back is not None, has_begin=begin_BHPN is not None, packed=segments_BS is not None,
        **sizes.tile, BN=sizes.columns, **sizes.launch(4),
    )  # fmt: skip
    return states_BcHPN, end_BHPN, kept_BHc, total_BH


def _add(
    sizes: _Sizes,
    states_BcHPN: Tensor,
    begin_BHPN: Tensor,
    kept_BHc: Tensor,
    back: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Add the contribution of ``begin`` to the states of a walk from zero; ``back`` as in :func:`_walk`."""
    before_BcHPN, dkeep_BHcnP = back or (states_BcHPN, kept_BHc)
    kernels.chunk_add_state[(sizes.chunks, sizes.heads, sizes.rows)](
        states_BcHPN, begin_BHPN.float().contiguous(), kept_BHc, before_BcHPN, dkeep_BHcnP, sizes.chunks, sizes.heads,
        dkeep_BHcnP[0, 0, 0].numel(), backward=back is not None, SIZE=sizes.width * sizes.size, num_warps=8,
    )  # fmt: skip


def _side_by_side(tensor: Tensor) -> Tensor:
    """Return ``tensor`` with contiguous heads (or groups) and channels; a slice of a wider projection is not copied."""
    fits = tensor.stride(3) == 1 and (tensor.stride(2) == tensor.shape[3] or tensor.shape[2] == 1)
    return tensor if fits else tensor.contiguous()


def _or(tensor: Tensor | None, unused: Tensor) -> Tensor:
    """Return ``tensor``, or ``unused`` as a placeholder pointer that the kernel does not read."""
    return unused if tensor is None else tensor
