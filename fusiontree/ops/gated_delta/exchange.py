"""State exchange of the gated delta rule: one scan computes the outputs from zero and the map of the initial state.

Outputs and final state are affine in the initial state, and every column of the state follows the same recurrence. So K
further value channels, with values of zero and the identity as initial state, end as the matrix P that multiplies an
initial state, and their outputs are the queries that read it: ``y = y_from_zero + y_of_these_channels h_0``. The
exchange then needs no second scan, and autograd differentiates all of it.

Shape legend: B rows, S tokens, H value heads, K channels of a key, V channels of a value, W = V + K.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusiontree.ops.gated_delta.reference import DeltaInputs

AffineExchange = Callable[[Tensor, Tensor], Tensor]
"""Returns the state before the tokens from the final state of a scan from zero and the matrix P."""


def exchanged(
    scan: Callable[[DeltaInputs], tuple[Tensor, Tensor]], inputs: DeltaInputs, state_exchange: AffineExchange
) -> tuple[Tensor, Tensor]:
    """Return the outputs and the final state of a ``scan`` whose initial state comes from ``state_exchange``."""
    assert inputs.initial_state_BHKV is None, "the initial state comes from the exchange"
    rows, heads, size, width = inputs.state_shape
    identity_KK = torch.eye(size, dtype=inputs.compute, device=inputs.v_BSHV.device)
    start_BHKW = F.pad(identity_KK, (width, 0)).expand(rows, heads, -1, -1)
    y_BSHW, end_BHKW = scan(inputs._replace(v_BSHV=F.pad(inputs.v_BSHV, (0, size)), initial_state_BHKV=start_BHKW))
    y_BSHV, readers_BSHK = y_BSHW.split([width, size], dim=-1)
    reached_BHKV, transition_BHKK = end_BHKW.split([width, size], dim=-1)
    initial_BHKV = state_exchange(reached_BHKV, transition_BHKK)
    y_BSHV = y_BSHV + torch.einsum("bshk,bhkv->bshv", readers_BSHK, initial_BHKV.to(readers_BSHK.dtype))
    return y_BSHV, reached_BHKV + transition_BHKK @ initial_BHKV
