"""The scan of a single token by the recurrence. On GPUs it is compiled into one kernel that reads the state once.

Shape legend: B rows, S = 1 token, G groups of B/C, R heads of a group, H = G R heads, P channels of a head, N size of
the state.
"""

from __future__ import annotations

import torch
from torch import Tensor


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

    Without an initial state the rows start here.
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
