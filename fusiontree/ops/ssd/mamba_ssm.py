"""The scan by mamba_ssm's Triton kernels (CUDA). The first call on a machine tunes the kernels for 1 to 2 minutes.

This module calls the kernels one by one, so that a state exchange between ranks can happen in between, and so that the
states before every chunk and the decays are kept for the backward pass instead of recomputed.

Shape legend: B rows, S tokens, c chunks, Q tokens of a chunk, H heads, G groups, P channels of a head, N state size.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fusiontree.ops.ssd.exchange import Exchange
from fusiontree.ops.ssd.reference import ScanInputs

_INT32 = 2**31


def unavailable(device: torch.device) -> str | None:
    """Return the reason why the kernels cannot run on ``device``, or None."""
    if device.type != "cuda":
        return "its kernels need a GPU"
    missing = [name for name in ("mamba_ssm", "triton", "einops") if find_spec(name) is None]
    return f"{', '.join(missing)} is not installed (pip install 'fusiontree[mamba-ssm]')" if missing else None


def ssd_mamba_ssm(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Compute :func:`fusiontree.ops.ssd.ssd_scan`.

    Raises:
        ValueError: a row is so long that the kernels' 32-bit offsets would silently overflow.
    """
    rows, length, heads, width = inputs.x_BSHP.shape
    size = inputs.B_BSGN.shape[-1]
    states = rows * -(-length // inputs.chunk_size) * heads * width * size
    read = (inputs.x_BSHP, inputs.B_BSGN, inputs.C_BSGN)
    largest = max(states, *(t.stride(0) * (rows - 1) + t.stride(1) * length for t in read))
    if largest >= _INT32:
        raise ValueError(
            f"rows of {length} tokens need offsets of {largest} elements, beyond the 32 bits of mamba_ssm's kernels; "
            f"use shorter rows, fewer rows per micro-batch, or kernels.ssd=reference"
        )
    # The kernels need a power of two of at least 16; the padding does not change the result.
    chunk_size = max(16, 1 << (inputs.chunk_size - 1).bit_length())
    return _Scan.apply(*inputs.for_kernels()._replace(chunk_size=chunk_size))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        from mamba_ssm.ops.triton.ssd_bmm import _bmm_chunk_fwd
        from mamba_ssm.ops.triton.ssd_chunk_scan import _chunk_scan_fwd
        from mamba_ssm.ops.triton.ssd_chunk_state import _chunk_cumsum_fwd, _chunk_state_fwd

        inputs = ScanInputs(*arguments)
        x_BSHP, B_BSGN, C_BSGN = (
            t if t.stride(-1) == 1 else t.contiguous() for t in (inputs.x_BSHP, inputs.B_BSGN, inputs.C_BSGN)
        )
        dt_BSH, A_H, D_H, chunk_size = inputs.dt_BSH, inputs.A_H, inputs.D_H, inputs.chunk_size
        initial_BHPN, whole_rows = inputs.initial_state_BHPN, inputs.whole_rows
        seq_idx_BS = inputs.segments_BS  # a first seq_idx of 0 continues the initial state
        decay_BHcQ, dt_BHcQ = _chunk_cumsum_fwd(dt_BSH, A_H, chunk_size)
        added_BcHPN = _chunk_state_fwd(B_BSGN, x_BSHP, dt_BHcQ, decay_BHcQ, seq_idx=seq_idx_BS, states_in_fp32=True)
        exchange = None
        if inputs.state_exchange is not None:
            from_zero_BHPN = _pass_on(added_BcHPN, decay_BHcQ, None, seq_idx_BS, chunk_size, x_BSHP.dtype)[1]
            total_BH = decay_BHcQ[..., -1].sum(-1).exp()
            if whole_rows:
                total_BH = torch.zeros_like(total_BH)
            elif seq_idx_BS is not None:
                total_BH = total_BH * (seq_idx_BS[:, -1:] == 0)
            exchange = Exchange(inputs.state_exchange, from_zero_BHPN, total_BH)
            # A row of one document must not see a state from before its start.
            initial_BHPN = None if whole_rows else exchange.initial_BHPN.float()
        before_BcHPN, final_BHPN = _pass_on(added_BcHPN, decay_BHcQ, initial_BHPN, seq_idx_BS, chunk_size, x_BSHP.dtype)
        scores_BcGQQ = _bmm_chunk_fwd(C_BSGN, B_BSGN, chunk_size, seq_idx=seq_idx_BS, output_dtype=torch.float32)
        y_BSHP, _ = _chunk_scan_fwd(
            scores_BcGQQ, x_BSHP, dt_BHcQ, decay_BHcQ, C_BSGN, before_BcHPN, D=D_H, seq_idx=seq_idx_BS
        )
        ctx.save_for_backward(x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, seq_idx_BS, decay_BHcQ, dt_BHcQ, before_BcHPN)
        ctx.chunk_size, ctx.has_initial, ctx.exchange = chunk_size, initial_BHPN is not None, exchange
        ctx.set_materialize_grads(False)
        return y_BSHP, final_BHPN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from mamba_ssm.ops.triton.ssd_bmm import _bmm_chunk_bwd, _bmm_chunk_fwd
        from mamba_ssm.ops.triton.ssd_chunk_scan import (
            _chunk_scan_bwd_dC,
            _chunk_scan_bwd_dcb,
            _chunk_scan_bwd_ddAcs_stable,
            _chunk_scan_bwd_dstates,
        )
        from mamba_ssm.ops.triton.ssd_chunk_state import _chunk_cumsum_bwd, _chunk_state_bwd_db
        from mamba_ssm.ops.triton.ssd_combined import _chunk_scan_chunk_state_bwd_dx

        x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, seq_idx, decay_BHcQ, dt_BHcQ, before_BcHPN = ctx.saved_tensors
        chunk_size, exchange, groups = ctx.chunk_size, ctx.exchange, B_BSGN.shape[2]
        dy_BSHP, dfinal_BHPN = grads
        dy_BSHP = torch.zeros_like(x_BSHP) if dy_BSHP is None else dy_BSHP
        dy_BSHP = dy_BSHP if dy_BSHP.stride(-1) == 1 else dy_BSHP.contiguous()

        # The states' gradients, from the last chunk to the first.
        from_outputs_BcHPN = _chunk_scan_bwd_dstates(C_BSGN, decay_BHcQ, dy_BSHP, seq_idx=seq_idx, dtype=x_BSHP.dtype)
        passed = (before_BcHPN, decay_BHcQ, from_outputs_BcHPN, seq_idx, chunk_size, ctx.has_initial)
        dadded_BcHPN, dchunk_decay_BHc, dinitial_BHPN = _pass_back(*passed, dfinal_BHPN)
        if exchange is not None:
            if dinitial_BHPN is None:
                dinitial_BHPN = torch.zeros_like(exchange.initial_BHPN)
            # A collective call: ranks that ignore their initial state take part too.
            dz_BHPN, more_BH = exchange.backward(dinitial_BHPN)
            dend_BHPN = dz_BHPN.float() if dfinal_BHPN is None else dfinal_BHPN + dz_BHPN
            dadded_BcHPN, dchunk_decay_BHc, _ = _pass_back(*passed, dend_BHPN)
            dchunk_decay_BHc = dchunk_decay_BHc + more_BH.unsqueeze(-1)
            dinitial_BHPN = None

        scores_BcGQQ = _bmm_chunk_fwd(C_BSGN, B_BSGN, chunk_size, seq_idx=seq_idx, output_dtype=torch.float32)
        dx_BSHP, ddt_BHcQ, dD_H = _chunk_scan_chunk_state_bwd_dx(
            x_BSHP, dt_BHcQ, decay_BHcQ, B_BSGN, scores_BcGQQ, dy_BSHP, dadded_BcHPN, D=D_H, seq_idx=seq_idx
        )
        dB_states, ddecay_next_BHcQ = _chunk_state_bwd_db(
            x_BSHP, dt_BHcQ, decay_BHcQ, dadded_BcHPN, seq_idx=seq_idx, B=B_BSGN, ngroups=groups
        )
        dC_states, ddecay_before_BHcQ = _chunk_scan_bwd_dC(
            before_BcHPN, decay_BHcQ, dy_BSHP, seq_idx=seq_idx, C=C_BSGN, ngroups=groups
        )
        dscores = _chunk_scan_bwd_dcb(x_BSHP, dt_BHcQ, decay_BHcQ, dy_BSHP, seq_idx=seq_idx, ngroups=groups)
        dB_BSGN, dC_BSGN = torch.empty_like(B_BSGN), torch.empty_like(C_BSGN)
        _bmm_chunk_bwd(C_BSGN, dscores, residual=dB_states, out=dB_BSGN)
        _bmm_chunk_bwd(B_BSGN, dscores.transpose(-1, -2), residual=dC_states, out=dC_BSGN)

        # Each log decay enters all later cumulative sums of its chunk.
        ddecay_before_BHcQ[..., -1] += dchunk_decay_BHc
        ddecay_BHcQ = _chunk_scan_bwd_ddAcs_stable(x_BSHP, dt_BHcQ, decay_BHcQ, dy_BSHP, scores_BcGQQ)
        ddecay_BHcQ += ddecay_next_BHcQ + ddecay_before_BHcQ.flip([-1]).cumsum(dim=-1).flip([-1])
        ddt_BSH, dA_H, _ = _chunk_cumsum_bwd(ddecay_BHcQ, ddt_BHcQ, dt_BSH, A_H, ddt=torch.empty_like(dt_BSH))
        return dx_BSHP, ddt_BSH, dA_H, dB_BSGN, dC_BSGN, dD_H, None, None, dinitial_BHPN, None


def _pass_on(
    added_BcHPN: Tensor,
    decay_BHcQ: Tensor,
    initial_BHPN: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the states before every chunk in ``dtype``, and the state after the last chunk in fp32."""
    from mamba_ssm.ops.triton.ssd_state_passing import _state_passing_fwd

    before, final = _state_passing_fwd(
        added_BcHPN.flatten(-2),
        decay_BHcQ[..., -1],
        initial_states=None if initial_BHPN is None else initial_BHPN.flatten(-2),
        seq_idx=seq_idx,
        chunk_size=chunk_size,
        out_dtype=dtype,
    )
    return before.view(added_BcHPN.shape), final.view(added_BcHPN[:, 0].shape)


def _pass_back(
    before_BcHPN: Tensor,
    decay_BHcQ: Tensor,
    from_outputs_BcHPN: Tensor,
    seq_idx: Tensor | None,
    chunk_size: int,
    has_initial: bool,
    dfinal_BHPN: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of each chunk's added state, of its log decay ``[B, H, c]``, and of the initial state."""
    from mamba_ssm.ops.triton.ssd_state_passing import _state_passing_bwd

    dadded, dchunk_decay, dinitial = _state_passing_bwd(
        before_BcHPN.flatten(-2),
        decay_BHcQ[..., -1],
        from_outputs_BcHPN.flatten(-2),
        dfinal_states=None if dfinal_BHPN is None else dfinal_BHPN.flatten(-2).contiguous(),
        seq_idx=seq_idx,
        has_initial_states=has_initial,
        chunk_size=chunk_size,
    )
    shape = before_BcHPN.shape
    return dadded.view(shape), dchunk_decay, None if dinitial is None else dinitial.view(shape[:1] + shape[2:]).float()
