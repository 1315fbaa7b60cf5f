"""The scan token by token, by its definition: what the product's scans are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from fusiontree.ops.documents import Documents


def ssd_sequential(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    D_H: Tensor,
    *,
    documents: Documents | None = None,
    initial_state_BHPN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`fusiontree.ops.ssd.ssd_scan` by its recurrence."""
    rows, length, heads, width = x_BSHP.shape
    groups, size = B_BSGN.shape[2:]
    B_BSHN = B_BSGN.repeat_interleave(heads // groups, dim=2)
    C_BSHN = C_BSGN.repeat_interleave(heads // groups, dim=2)
    state_BHPN = x_BSHP.new_zeros(rows, heads, width, size) if initial_state_BHPN is None else initial_state_BHPN
    outputs = []
    for t in range(length):
        decay_BH = (A_H * dt_BSH[:, t]).exp()
        if documents is not None:
            decay_BH = decay_BH * (documents.positions_BS[:, t] != 0).to(decay_BH.dtype)[:, None]
        elif t == 0 and initial_state_BHPN is None:
            decay_BH = torch.zeros_like(decay_BH)
        update_BHPN = torch.einsum("bh,bhp,bhn->bhpn", dt_BSH[:, t], x_BSHP[:, t], B_BSHN[:, t])
        state_BHPN = decay_BH[..., None, None] * state_BHPN + update_BHPN
        outputs.append(torch.einsum("bhn,bhpn->bhp", C_BSHN[:, t], state_BHPN) + D_H[:, None] * x_BSHP[:, t])
    return torch.stack(outputs, dim=1), state_BHPN
