"""The scan in plain PyTorch for any device: by chunks, and by the recurrence for one token.

Within a chunk, outputs are a masked product of C, B and decays; between chunks a small state is passed on. The cost is
linear in row length (Dao and Gu 2024, "Transformers are SSMs", section 6).

Shape legend: B rows, S tokens, c chunks, Q tokens of a chunk, G groups of B/C, R heads of a group, H = G R heads, P
channels of a head, N state size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusiontree.ops.documents import Documents

StateExchange = Callable[[Tensor, Tensor], Tensor]


class ScanInputs(NamedTuple):
    """Arguments of :func:`fusiontree.ops.ssd.ssd_scan`, which describes them, in the order of the formulas."""

    x_BSHP: Tensor
    dt_BSH: Tensor
    A_H: Tensor
    B_BSGN: Tensor
    C_BSGN: Tensor
    D_H: Tensor
    chunk_size: int
    documents: Documents | None = None
    initial_state_BHPN: Tensor | None = None
    state_exchange: StateExchange | None = None

    @property
    def whole_rows(self) -> bool:
        """True if each row is exactly one document from its start, so that no state enters it."""
        return self.documents is not None and self.documents.whole_rows

    @property
    def segments_BS(self) -> Tensor | None:
        """Number of document starts up to each token, int32; segment 0 continues the initial state. None: no masks."""
        return None if self.documents is None else self.documents.inner_segments_BS

    def for_kernels(self) -> ScanInputs:
        """Return the inputs with steps, weights per head and state in fp32, and without a state that no row continues.

        Must run outside an autograd function, so that gradients are cast back.
        """
        initial = None if self.whole_rows or self.initial_state_BHPN is None else self.initial_state_BHPN.float()
        return self._replace(
            dt_BSH=self.dt_BSH.float(), A_H=self.A_H.float(), D_H=self.D_H.float(), initial_state_BHPN=initial
        )


def ssd_reference(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Compute :func:`fusiontree.ops.ssd.ssd_scan`."""
    segments_BS = None if inputs.documents is None else inputs.documents.segments_BS
    return scan_segments(*inputs[:7], segments_BS, inputs.initial_state_BHPN, inputs.state_exchange)


def scan_segments(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    D_H: Tensor,
    chunk_size: int,
    segments_BS: Tensor | None = None,
    initial_state_BHPN: Tensor | None = None,
    state_exchange: StateExchange | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan in chunks: h_t = exp(A dt_t) h_{t-1} + dt_t B_t x_t and y_t = C_t h_t + D x_t, in fp32 or better.

    ``segments_BS`` counts the document starts up to each token: segment 0 continues ``initial_state_BHPN``, and every
    other segment starts from zero; None means that no document starts. ``state_exchange`` returns the initial state
    from the final state of a scan from zero and the total decay. Returns y in x's dtype, and the final state.

    Source: Dao and Gu 2024, "Transformers are SSMs", section 6. The cost is linear in the number of tokens.
    """
    rows, length, heads, width = x_BSHP.shape
    groups, size = B_BSGN.shape[2:]
    chunk = min(chunk_size, length)
    compute = torch.promote_types(x_BSHP.dtype, torch.float32)
    x_BcGRQP = in_chunks(x_BSHP.to(compute), chunk).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5)
    dt_BcGRQ = in_chunks(dt_BSH.to(compute), chunk).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2)
    B_BcGQN = in_chunks(B_BSGN.to(compute), chunk).transpose(2, 3)
    C_BcGQN = in_chunks(C_BSGN.to(compute), chunk).transpose(2, 3)
    xdt_BcGRQP = x_BcGRQP * dt_BcGRQ.unsqueeze(-1)
    log_decay_BcGRQ = (dt_BcGRQ * A_H.to(compute).view(groups, -1, 1)).cumsum(-1)

    marks = ChunkMarks(segments_BS, chunk, x_BSHP.device)
    # Within chunks.
    distance_BcGRQQ = log_decay_BcGRQ.unsqueeze(-1) - log_decay_BcGRQ.unsqueeze(-2)
    decay_BcGRQQ = distance_BcGRQQ.masked_fill(~marks.visible, float("-inf")).exp()
    scores_BcGQQ = C_BcGQN @ B_BcGQN.transpose(-1, -2)
    y_BcGRQP = (scores_BcGQQ.unsqueeze(3) * decay_BcGRQQ) @ xdt_BcGRQP

    # Each chunk's contribution to the state at its end, and its decay of the state at its start.
    to_end_BcGRQ = (log_decay_BcGRQ[..., -1:] - log_decay_BcGRQ).exp() * marks.reaches_end
    added_BcGRPN = (xdt_BcGRQP * to_end_BcGRQ.unsqueeze(-1)).transpose(-1, -2) @ B_BcGQN.unsqueeze(3)
    kept_BcGR = log_decay_BcGRQ[..., -1].exp() * marks.passes_through

    initial = initial_state_BHPN
    if state_exchange is not None:
        from_zero_BHPN = _pass_states(added_BcGRPN, kept_BcGR, None)[1].view(rows, heads, width, size)
        initial = state_exchange(from_zero_BHPN, kept_BcGR.prod(dim=1).view(rows, heads))
    if initial is not None:
        initial = initial.to(compute).view(rows, groups, -1, width, size)
    before_BcGRPN, final_BGRPN = _pass_states(added_BcGRPN, kept_BcGR, initial)

    from_start_BcGRQ = log_decay_BcGRQ.exp() * marks.continues
    y_BcGRQP = y_BcGRQP + (C_BcGQN.unsqueeze(3) @ before_BcGRPN.transpose(-1, -2)) * from_start_BcGRQ.unsqueeze(-1)
    y_BSHP = y_BcGRQP.permute(0, 1, 4, 2, 3, 5).reshape(rows, -1, heads, width)[:, :length]
    y_BSHP = y_BSHP + D_H.to(compute).unsqueeze(-1) * x_BSHP.to(compute)
    return y_BSHP.to(x_BSHP.dtype), final_BGRPN.reshape(rows, heads, width, size)


def in_chunks(tensor: Tensor, chunk: int) -> Tensor:
    """``[B, S, …]`` to ``[B, c, Q, …]``; padded steps have dt = 0, so they neither decay the state nor add to it."""
    padding = -tensor.shape[1] % chunk
    padded = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, padding)) if padding else tensor
    return padded.unflatten(1, (-1, chunk))


class ChunkMarks:
    """Masks of the chunks from document starts, broadcastable to [B, c, G, R, ...]."""

    def __init__(self, segments_BS: Tensor | None, chunk: int, device: torch.device) -> None:
        causal_QQ = torch.ones(chunk, chunk, dtype=torch.bool, device=device).tril()
        if segments_BS is None:
            self.visible: Tensor = causal_QQ
            self.reaches_end: Tensor | float = 1.0
            self.continues: Tensor | float = 1.0
            self.passes_through: Tensor | float = 1.0
            return
        padding = -segments_BS.shape[1] % chunk
        segments_BS = torch.cat([segments_BS, segments_BS[:, -1:].expand(-1, padding)], dim=1)
        segments_BcQ = segments_BS.unflatten(1, (-1, chunk))
        last_Bc = segments_BcQ[..., -1]
        # Segment 0 continues the tokens before this row or chunk, so the initial state belongs to it.
        previous_Bc = torch.cat([torch.zeros_like(last_Bc[:, :1]), last_Bc[:, :-1]], dim=1)
        same_BcQQ = segments_BcQ.unsqueeze(-1) == segments_BcQ.unsqueeze(-2)
        self.visible = (same_BcQQ & causal_QQ)[:, :, None, None]
        self.reaches_end = (segments_BcQ == last_Bc.unsqueeze(-1))[:, :, None, None]
        self.continues = (segments_BcQ == previous_Bc.unsqueeze(-1))[:, :, None, None]
        self.passes_through = (last_Bc == previous_Bc)[:, :, None, None]


def _pass_states(added_BcGRPN: Tensor, kept_BcGR: Tensor, initial_BGRPN: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the state before every chunk and after the last: h_c = kept_c h_{c-1} + added_c."""
    state = torch.zeros_like(added_BcGRPN[:, 0]) if initial_BGRPN is None else initial_BGRPN
    before = []
    for added_BGRPN, kept_BGR in zip(added_BcGRPN.unbind(1), kept_BcGR.unbind(1), strict=True):
        before.append(state)
        state = kept_BGR[..., None, None] * state + added_BGRPN
    return torch.stack(before, dim=1), state


def ssd_step(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    D_H: Tensor,
    initial_state_BHPN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`fusiontree.ops.ssd.ssd_scan` of rows of one token that continue ``initial_state_BHPN``.

    Without an initial state the rows start here. On GPUs it is compiled into one kernel that reads the state once.
    """
    rows, length, heads, width = x_BSHP.shape
    assert length == 1, f"a step is one token, not {length}"
    groups, size = B_BSGN.shape[2:]
    compute = torch.promote_types(x_BSHP.dtype, torch.float32)
    x_BGRP = x_BSHP.to(compute).reshape(rows, groups, -1, width)
    dt_BGR1 = dt_BSH.to(compute).reshape(rows, groups, -1, 1)
    B_BG11N = B_BSGN.to(compute).reshape(rows, groups, 1, 1, size)
    C_BG11N = C_BSGN.to(compute).reshape(rows, groups, 1, 1, size)
    A_GR1, D_GR1 = A_H.to(compute).reshape(groups, -1, 1), D_H.to(compute).reshape(groups, -1, 1)
    state_BGRPN = (dt_BGR1 * x_BGRP).unsqueeze(-1) * B_BG11N
    if initial_state_BHPN is not None:
        before_BGRPN = initial_state_BHPN.to(compute).reshape(rows, groups, -1, width, size)
        state_BGRPN = state_BGRPN + (A_GR1 * dt_BGR1).exp().unsqueeze(-1) * before_BGRPN
    y_BGRP = (state_BGRPN * C_BG11N).sum(-1) + D_GR1 * x_BGRP
    return y_BGRP.reshape(x_BSHP.shape).to(x_BSHP.dtype), state_BGRPN.reshape(rows, heads, width, size)
