"""The gated delta rule token by token, by its definition, in fp32 or better.

Shape legend: B rows, S tokens, G key heads, R value heads of a key head, H = G R value heads, K channels of a key, V
channels of a value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusiontree.ops.documents import Documents


class DeltaInputs(NamedTuple):
    """Arguments of :func:`fusiontree.ops.gated_delta.gated_delta_rule`, which describes them."""

    q_BSGK: Tensor
    k_BSGK: Tensor
    v_BSHV: Tensor
    log_decay_BSH: Tensor
    beta_BSH: Tensor
    chunk_size: int = 64
    documents: Documents | None = None
    initial_state_BHKV: Tensor | None = None

    @property
    def compute(self) -> torch.dtype:
        """Precision of the plain PyTorch forms."""
        return torch.promote_types(self.v_BSHV.dtype, torch.float32)

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """``[B, H, K, V]``."""
        rows, _, heads, width = self.v_BSHV.shape
        return rows, heads, self.k_BSGK.shape[-1], width


def gated_delta_reference(inputs: DeltaInputs) -> tuple[Tensor, Tensor]:
    """Compute :func:`fusiontree.ops.gated_delta.gated_delta_rule` by its recurrence."""
    state_BHKV = inputs.initial_state_BHKV
    outputs = []
    for token in range(inputs.v_BSHV.shape[1]):
        if inputs.documents is not None and state_BHKV is not None:
            continues_B = inputs.documents.positions_BS[:, token] != 0
            state_BHKV = torch.where(continues_B[:, None, None, None], state_BHKV, 0.0)
        q, k, v, log_decay, beta = (t[:, token : token + 1] for t in inputs[:5])
        y_BSHV, state_BHKV = gated_delta_step(q, k, v, log_decay, beta, state_BHKV)
        outputs.append(y_BSHV)
    assert state_BHKV is not None, "a row has at least one token"
    return torch.cat(outputs, dim=1), state_BHKV


def gated_delta_step(
    q_BSGK: Tensor,
    k_BSGK: Tensor,
    v_BSHV: Tensor,
    log_decay_BSH: Tensor,
    beta_BSH: Tensor,
    initial_state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute one token (S = 1) that continues ``initial_state_BHKV``; without it the row starts here."""
    rows, length, heads, width = v_BSHV.shape
    assert length == 1, f"a step is one token, not {length}"
    groups, size = k_BSGK.shape[2:]
    compute = torch.promote_types(v_BSHV.dtype, torch.float32)
    q_BG1K1 = q_BSGK.to(compute).reshape(rows, groups, 1, size, 1) * size**-0.5
    k_BG1K1 = k_BSGK.to(compute).reshape(rows, groups, 1, size, 1)
    v_BGR1V = v_BSHV.to(compute).reshape(rows, groups, -1, 1, width)
    decay_BGR11 = log_decay_BSH.to(compute).exp().reshape(rows, groups, -1, 1, 1)
    beta_BGR11 = beta_BSH.to(compute).reshape(rows, groups, -1, 1, 1)
    if initial_state_BHKV is None:
        state_BGRKV = beta_BGR11 * k_BG1K1 * v_BGR1V
    else:
        before_BGRKV = decay_BGR11 * initial_state_BHKV.to(compute).reshape(rows, groups, -1, size, width)
        recalled_BGR1V = (k_BG1K1 * before_BGRKV).sum(-2, keepdim=True)
        state_BGRKV = before_BGRKV + beta_BGR11 * k_BG1K1 * (v_BGR1V - recalled_BGR1V)
    y_BGRV = (q_BG1K1 * state_BGRKV).sum(-2)
    return y_BGRV.reshape(v_BSHV.shape).to(v_BSHV.dtype), state_BGRKV.reshape(rows, heads, size, width)
