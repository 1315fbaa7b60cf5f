"""FusionTree language model for transformers, in one file of plain PyTorch (no kernels, any device).

Every layer reads the sequence twice in parallel, by a Mamba-2 mixer and by attention whose first heads see a window and
whose last heads see all earlier tokens; a gate mixes the two outputs per token and channel. The configuration
can replace the mixers, the gate and the input of the MLP.

Shape legend: B rows, S new tokens, T cached and new tokens, C channels, K key/value heads or taps of a convolution, D
channels of an attention head, V vocabulary; H heads, G groups of B and C, R heads of a group, P channels of a head and
N size of the state of a Mamba-2 mixer; c scan chunks, Q tokens of a scan chunk.

The formulas between the two lines of dashes are copied from the code that trained the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .configuration_fusiontree import FusionTreeConfig

QUERIES_PER_BLOCK = 1024  # queries per attention mask, which limits the memory of masks
TOKENS_PER_SCAN = 4096  # tokens per call of the scan, which limits the memory of its matrices
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")  # arguments that mark several texts in a row

# ---- Copied by python -m fusiontree.convert.hf_assemble; change the named modules instead. ----


# fusiontree.ops.norm.reference
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis, in x's dtype (Zhang and Sennrich 2019)."""
    compute = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(compute), x.shape[-1:], weight.to(compute), eps).to(x.dtype)


# fusiontree.ops.norm.reference
def gated_rms_norm(y_BSC: Tensor, z_BSC: Tensor, weight_C: Tensor, *, groups: int, eps: float) -> Tensor:
    """Return RMSNorm(y * silu(z)) in y's dtype; ``groups`` equal blocks of channels are normalized separately."""
    compute = torch.promote_types(y_BSC.dtype, torch.float32)
    gated = y_BSC.to(compute) * F.silu(z_BSC.to(compute))
    grouped = gated.unflatten(-1, (groups, -1))
    normed = F.rms_norm(grouped, grouped.shape[-1:], None, eps).flatten(-2)
    return (normed * weight_C.to(compute)).to(y_BSC.dtype)


# fusiontree.ops.conv.reference
def _activated(y_BSC: Tensor, bias_C: Tensor | None, activation: str | None) -> Tensor:
    if bias_C is not None:
        y_BSC = y_BSC + bias_C.to(y_BSC.dtype)
    if activation == "silu":
        return F.silu(y_BSC)
    if activation is not None:
        raise ValueError(f"unknown activation '{activation}'; use 'silu' or None")
    return y_BSC


# fusiontree.ops.conv.reference
def shifted_products(
    x_BSC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    positions_BS: Tensor | None,
    initial_BKC: Tensor | None,
    activation: str | None,
) -> Tensor:
    """Sum the taps; a token at position p of its document uses at most p earlier tokens (None: all in the row)."""
    length, taps = x_BSC.shape[1], weight_CK.shape[1]
    if initial_BKC is None:
        padded_BTC = F.pad(x_BSC, (0, 0, taps - 1, 0))
    else:
        padded_BTC = torch.cat([initial_BKC.to(x_BSC.dtype), x_BSC], dim=1)
    compute = torch.promote_types(x_BSC.dtype, torch.float32)
    weight_KC = weight_CK.to(compute).t()
    y_BSC = x_BSC * weight_KC[-1]
    for back in range(1, taps):
        tap_BSC = padded_BTC[:, taps - 1 - back : taps - 1 - back + length] * weight_KC[taps - 1 - back]
        if positions_BS is not None:
            tap_BSC = tap_BSC * (positions_BS >= back).unsqueeze(-1)
        y_BSC = y_BSC + tap_BSC
    return _activated(y_BSC, bias_C, activation).to(x_BSC.dtype)


# fusiontree.ops.ssd.reference
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


# fusiontree.ops.ssd.reference
def _pass_states(added_BcGRPN: Tensor, kept_BcGR: Tensor, initial_BGRPN: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the state before every chunk and after the last: h_c = kept_c h_{c-1} + added_c."""
    state = torch.zeros_like(added_BcGRPN[:, 0]) if initial_BGRPN is None else initial_BGRPN
    before = []
    for added_BGRPN, kept_BGR in zip(added_BcGRPN.unbind(1), kept_BcGR.unbind(1), strict=True):
        before.append(state)
        state = kept_BGR[..., None, None] * state + added_BGRPN
    return torch.stack(before, dim=1), state


# fusiontree.ops.ssd.reference
StateExchange = Callable[[Tensor, Tensor], Tensor]


# fusiontree.ops.ssd.reference
def in_chunks(tensor: Tensor, chunk: int) -> Tensor:
    """``[B, S, …]`` to ``[B, c, Q, …]``; padded steps have dt = 0, so they neither decay the state nor add to it."""
    padding = -tensor.shape[1] % chunk
    padded = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, padding)) if padding else tensor
    return padded.unflatten(1, (-1, chunk))


# fusiontree.ops.ssd.reference
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


# fusiontree.ops.gated_delta.chunked
def gated_delta_segments(
    q_BSGK: Tensor,
    k_BSGK: Tensor,
    v_BSHV: Tensor,
    log_decay_BSH: Tensor,
    beta_BSH: Tensor,
    chunk_size: int,
    segments_BS: Tensor | None = None,
    initial_state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan in chunks, in fp32 or better; the cost is linear in the number of tokens.

    ``segments_BS`` counts the document starts up to each token: segment 0 continues ``initial_state_BHKV``, and every
    other segment starts from zero; None means that no document starts. Returns y in v's dtype, and the final state.
    """
    rows, length, heads, width = v_BSHV.shape
    groups, size = k_BSGK.shape[2:]
    compute, chunk = torch.promote_types(v_BSHV.dtype, torch.float32), min(chunk_size, length)
    # Padded tokens have beta = 0 and decay 1: they change no state.
    q_BcGQK, k_BcGQK = (in_chunks(t.to(compute), chunk).transpose(2, 3) for t in (q_BSGK, k_BSGK))
    v_BcGRQV = in_chunks(v_BSHV.to(compute), chunk).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5)
    log_decay_BcGRQ, beta_BcGRQ = (
        in_chunks(t.to(compute), chunk).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2)
        for t in (log_decay_BSH, beta_BSH)
    )
    log_decay_BcGRQ = log_decay_BcGRQ.cumsum(-1)
    marks = ChunkMarks(segments_BS, chunk, v_BSHV.device)
    distance_BcGRQQ = log_decay_BcGRQ.unsqueeze(-1) - log_decay_BcGRQ.unsqueeze(-2)
    decay_BcGRQQ = distance_BcGRQQ.masked_fill(~marks.visible, float("-inf")).exp()
    from_start_BcGRQ1 = (log_decay_BcGRQ.exp() * marks.continues).unsqueeze(-1)
    to_end_BcGRQ1 = ((log_decay_BcGRQ[..., -1:] - log_decay_BcGRQ).exp() * marks.reaches_end).unsqueeze(-1)
    kept_BcGR11 = (log_decay_BcGRQ[..., -1].exp() * marks.passes_through)[..., None, None]

    beta_BcGRQ1 = beta_BcGRQ.unsqueeze(-1)
    keys_BcG1QK = k_BcGQK.unsqueeze(3)
    recalls_BcGRQQ = beta_BcGRQ1 * decay_BcGRQQ * (k_BcGQK @ k_BcGQK.transpose(-1, -2)).unsqueeze(3)
    wanted = torch.cat([beta_BcGRQ1 * v_BcGRQV, beta_BcGRQ1 * from_start_BcGRQ1 * keys_BcG1QK], dim=-1)
    # Only the entries below the diagonal of the matrix are read; its diagonal counts as ones.
    solved = torch.linalg.solve_triangular(recalls_BcGRQQ, wanted, upper=False, unitriangular=True)
    u_BcGRQV, w_BcGRQK = solved.split([width, size], dim=-1)
    scores_BcGRQQ = decay_BcGRQQ * (q_BcGQK @ k_BcGQK.transpose(-1, -2) * size**-0.5).unsqueeze(3)
    queries_BcGRQK = q_BcGQK.unsqueeze(3) * size**-0.5 * from_start_BcGRQ1
    keys_BcGRKQ = (keys_BcG1QK * to_end_BcGRQ1).transpose(-1, -2)

    shape = (rows, groups, heads // groups, size, width)
    initial = v_BcGRQV.new_zeros(shape) if initial_state_BHKV is None else initial_state_BHKV
    state_BGRKV = initial.to(compute).reshape(shape)
    outputs = []
    per_chunk = (u_BcGRQV, w_BcGRQK, scores_BcGRQQ, queries_BcGRQK, keys_BcGRKQ, kept_BcGR11)
    for u, w, scores, queries, keys, kept in zip(*(t.unbind(1) for t in per_chunk), strict=True):
        written_BGRQV = u - w @ state_BGRKV
        outputs.append(queries @ state_BGRKV + scores @ written_BGRQV)
        state_BGRKV = kept * state_BGRKV + keys @ written_BGRQV
    y_BcGRQV = torch.stack(outputs, dim=1)
    y_BSHV = y_BcGRQV.permute(0, 1, 4, 2, 3, 5).reshape(rows, -1, heads, width)[:, :length]
    return y_BSHV.to(v_BSHV.dtype), state_BGRKV.reshape(rows, heads, size, width)


# fusiontree.ops.gated_delta.formulas
def decay_and_beta(a_BSH: Tensor, b_BSH: Tensor, A_log_H: Tensor, dt_bias_H: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log decay ``-exp(A_log) softplus(a + dt_bias)`` and the writing strength ``sigmoid(b)``."""
    a_BSH, b_BSH = a_BSH.to(dt_bias_H.dtype), b_BSH.to(dt_bias_H.dtype)
    return -torch.exp(A_log_H) * F.softplus(a_BSH + dt_bias_H), torch.sigmoid(b_BSH)


# fusiontree.ops.gated_delta.formulas
def norm_then_gate(y_BSHV: Tensor, z_BSC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """Return ``RMSNorm(y) * weight * silu(z)``, ``[B, S, C]``; each head is normalized separately.

    Source: the output of Gated DeltaNet (arXiv:2412.06464, section 3.3). Mamba-2's norm has the gate inside the norm.
    """
    compute = torch.promote_types(y_BSHV.dtype, torch.float32)
    normed_BSC = F.rms_norm(y_BSHV.to(compute), y_BSHV.shape[-1:], None, eps).flatten(2)
    return (normed_BSC * weight_C.to(compute) * F.silu(z_BSC.to(compute))).to(y_BSHV.dtype)


# fusiontree.ops.gated_delta.formulas
_SMALLEST = 1e-6


# fusiontree.ops.gated_delta.formulas
def unit_length(x_BSGK: Tensor) -> Tensor:
    """Return every head's vector divided by its length."""
    compute = torch.promote_types(x_BSGK.dtype, torch.float32)
    x = x_BSGK.to(compute)
    return (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _SMALLEST)).to(x_BSGK.dtype)


# fusiontree.ops.rotary.reference
def rotary_tables(positions_BS: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [B, S, D/2] in fp32 of position x theta^(-2i/D).

    The angles are computed in float64: at position 131,072 fp32 would be off by 1e-2 rad.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions_BS.device) / head_dim
    angles_BSD = positions_BS.unsqueeze(-1).double() * theta**-exponent
    return angles_BSD.cos().float(), angles_BSD.sin().float()


# fusiontree.ops.rotary.reference
def apply_rotary(x_BSHD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
    """Rotate channels i and i + D/2 by the tables' angles, in fp32 or better; returns the dtype of ``x``."""
    compute = torch.promote_types(x_BSHD.dtype, torch.float32)
    first, second = x_BSHD.to(compute).chunk(2, dim=-1)
    cos, sin = cos_BSD.unsqueeze(2).to(compute), sin_BSD.unsqueeze(2).to(compute)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x_BSHD.dtype)


# fusiontree.ops.attention.reference
def visible_keys(
    queries: int, keys: int, window: int | None, positions_BS: Tensor | None, device: torch.device
) -> Tensor:
    """Return the mask of visible keys per query, [B or 1, S, T]."""
    index_S = torch.arange(queries, device=device) + keys - queries
    distance_ST = index_S.unsqueeze(1) - torch.arange(keys, device=device)
    visible_BST = (distance_ST >= 0).unsqueeze(0)
    if window is not None:
        visible_BST = visible_BST & (distance_ST < window)
    if positions_BS is not None:
        visible_BST = visible_BST & (distance_ST <= positions_BS.unsqueeze(-1))
    return visible_BST


# fusiontree.ops.attention.sdpa
def sdpa(q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Call torch's function; without a mask, attention is causal and there are as many queries as keys."""
    grouped = q_BSHD.shape[2] != k_BTKD.shape[2]
    out_BHSD = F.scaled_dot_product_attention(
        q_BSHD.transpose(1, 2),
        k_BTKD.transpose(1, 2),
        v_BTKD.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=grouped,
    )
    return out_BHSD.transpose(1, 2)


# fusiontree.ops.gate.reference
GivenBranches = Literal["both", "first", "second"]


# fusiontree.ops.gate.reference
def mix(logits_BSC: Tensor, branches_BSC: Tensor, given: GivenBranches) -> Tensor:
    """Return g first + (1 - g) second with g = sigmoid(logits); a missing branch counts as zeros."""
    gate = torch.sigmoid(logits_BSC)
    if given == "both":
        first_BSC, second_BSC = branches_BSC.chunk(2, dim=-1)
        return torch.lerp(second_BSC, first_BSC, gate)
    return branches_BSC * (gate if given == "first" else 1 - gate)


# fusiontree.models.srte
def sincos_encoding(positions_BS: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Return sines in even channels and cosines in odd channels; angles are float64, as for RoPE."""
    even = torch.arange(0, channels, 2, dtype=torch.float64, device=positions_BS.device)
    angle = positions_BS.unsqueeze(-1).double() * torch.exp(even * (-math.log(10000.0) / channels))
    return torch.stack([angle.sin().to(dtype), angle.cos().to(dtype)], dim=-1).flatten(2)


# fusiontree.ops.gelu.reference
def gelu_product(x_BSC: Tensor, module: nn.Module, sum_BSD: Tensor | None = None) -> Tensor:
    """Compute :func:`fusiontree.ops.gelu.gelu_product`."""
    product_BSD: Tensor = module(F.gelu(x_BSC))
    return product_BSD if sum_BSD is None else product_BSD + sum_BSD


# fusiontree.models.gate
class Alignment(nn.Module):
    """Computes the input of gate and MLP from the branches' outputs: sum of a two-layer GELU MLP and a linear map."""

    def __init__(self, branches: int, hidden_size: int, backend: str = "auto") -> None:
        super().__init__()
        self.up = nn.Linear(branches * hidden_size, hidden_size, bias=False)
        self.down = nn.Linear(hidden_size, hidden_size, bias=False)
        self.skip = nn.Linear(branches * hidden_size, hidden_size, bias=False)

    def forward(self, ma_BSC: Tensor) -> tuple[Tensor, Tensor]:
        """Map the branches' concatenated outputs, ``[B, S, branches * hidden_size]``, to ``[B, S, hidden_size]``.

        Also returns ``ma`` for the gate mix, onto whose gradient the backward pass of the alignment adds its own.
        """
        inner_BSC, skip_BSC, ma_BSC = self.up(ma_BSC), self.skip(ma_BSC), ma_BSC
        return gelu_product(inner_BSC, self.down, skip_BSC), ma_BSC


# fusiontree.models.gate
class BranchNorm(nn.Module):
    """RMS norm of each branch's output separately, with separate weights."""

    def __init__(self, branches: int, hidden_size: int, eps: float, backend: str = "auto") -> None:
        super().__init__()
        self.branches, self.eps = branches, eps
        self.weight = nn.Parameter(torch.empty(branches * hidden_size))

    def forward(self, outputs_BSC: Tensor) -> Tensor:
        """Normalize the branches' concatenated outputs, ``[B, S, branches * hidden_size]``."""
        return self._normalized(outputs_BSC, self.weight)

    def _normalized(self, outputs_BSC: Tensor, weight_C: Tensor) -> Tensor:
        parts = zip(outputs_BSC.chunk(self.branches, dim=-1), weight_C.chunk(self.branches), strict=True)
        normed = [rms_norm(part_BSC, weight, self.eps) for part_BSC, weight in parts]
        return torch.cat(normed, dim=-1)


# fusiontree.models.gate
class FusionGate(nn.Module):
    """``W_up tanh(W_down z)``: logits of the first branch's weight g in the mix, for every token and channel.

    The second branch's weight is 1 - g, so a layer has at most two branches. ``W_up`` starts at zero, and with it every
    gate at 0.5.
    """

    def __init__(self, config: FusionTreeConfig) -> None:
        super().__init__()
        self.down = nn.Linear(config.hidden_size, config.gate_rank, bias=False)
        self.up = nn.Linear(config.gate_rank, config.hidden_size, bias=False)

    def forward(self, z_BSC: Tensor, down_BSR: Tensor | None = None) -> Tensor:
        """Return the logits ``[B, S, C]``; ``down [B, S, rank]`` is ``W_down z`` if it was computed already."""
        return self.up(torch.tanh(self.down(z_BSC) if down_BSR is None else down_BSR))


# fusiontree.models.gate
def _sum(outputs_BSC: Tensor) -> Tensor:
    return torch.add(*outputs_BSC.chunk(2, dim=-1))


# fusiontree.models.gate
def _mean(outputs_BSC: Tensor) -> Tensor:
    return _sum(outputs_BSC) / 2


# fusiontree.models.gate
def even_mix(outputs_BSC: Tensor, mix: str, branches: int) -> Tensor:
    """Return the ``mix`` of a block without a gate, a mean, sum or concatenation, from the concatenated outputs."""
    if mix == "concat" or branches == 1:
        return outputs_BSC
    formula = _sum if mix == "sum" else _mean
    return formula(outputs_BSC)


# fusiontree.models.block
def _swiglu(gate_BSC: Tensor, up_BSC: Tensor) -> Tensor:
    return F.silu(gate_BSC) * up_BSC


# fusiontree.ops.linear.reference
def add_product(sum_BSD: Tensor, x_BSC: Tensor, module: nn.Module) -> Tensor:
    """Compute :func:`fusiontree.ops.linear.add_product`."""
    product_BSD: Tensor = module(x_BSC)
    return sum_BSD + product_BSD


# fusiontree.models.block
class MLP(nn.Module):
    """``down(gelu(up(z)))``, or SwiGLU (Shazeer 2020): ``down(silu(gate(z)) * up(z))``."""

    def __init__(self, config: FusionTreeConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=False)
        self.gate: nn.Linear | None = None
        if config.mlp_activation == "swiglu":
            self.gate = nn.Linear(config.hidden_size, config.mlp_size, bias=False)

    def forward(self, z_BSC: Tensor, sum_BSC: Tensor | None = None, projected: Sequence[Tensor] = ()) -> Tensor:
        """Return ``[B, S, C]``.

        Args:
            z_BSC: input.
            sum_BSC: product to which the result is added; of no further use. None: return the MLP's result alone.
            projected: results of :meth:`projections` for z; empty: compute them.
        """
        if not projected:
            projected = [module(z_BSC) for module in self.projections()]
        if self.gate is None:
            return gelu_product(projected[0], self.down, sum_BSC)
        inner_BSC = _swiglu(*projected)
        if sum_BSC is None:
            return self.down(inner_BSC)
        return add_product(sum_BSC, inner_BSC, self.down)

    def projections(self) -> tuple[nn.Module, ...]:
        """Return the linear maps of the input."""
        return (self.up,) if self.gate is None else (self.gate, self.up)


# ---- End of the copied definitions. ----


class TokenLayout:
    """Columns, positions and padding of the new tokens of a forward."""

    def __init__(
        self,
        rows: int,
        length: int,
        mask: Tensor | None,
        start: int,
        first_B: Tensor | None,
        device: Any,
        capacity: int | None = None,
    ) -> None:
        """Lay out ``length`` new columns after ``start`` cached columns, whose rows begin at the columns ``first_B``.

        ``mask`` is 1 on real tokens and 0 on pads, for all columns or for the new columns; None means no pads.
        ``capacity`` is that of the cache.

        Raises:
            ValueError: a pad is between real tokens or after a cached token, or a row has no real token.
        """
        self.start, self.capacity = start, capacity
        self.columns_S = torch.arange(start, start + length, device=device)
        new_BS = None if mask is None else mask[:, -length:].to(device).bool()
        self.real_BS = None if new_BS is None or bool(new_BS.all()) else new_BS
        """True on real tokens; None if there are no pads."""
        if first_B is not None:
            if first_B.shape[0] != rows:
                raise ValueError(f"the cache holds {first_B.shape[0]} rows and the input {rows}")
            if self.real_BS is not None:
                raise ValueError(
                    "attention_mask marks new tokens as pads; pads are allowed before the first token only"
                )
        elif self.real_BS is None:
            first_B = torch.zeros(rows, dtype=torch.int64, device=device)
        else:
            first_B = self.real_BS.int().argmax(1)
            end_B = first_B + self.real_BS.sum(1)
            run_BS = (self.columns_S >= first_B[:, None]) & (self.columns_S < end_B[:, None])
            if not torch.equal(run_BS, self.real_BS) or not bool(self.real_BS.any(1).all()):
                raise ValueError("attention_mask must mark one run of real tokens in every row")
        self.first_B = first_B
        self.positions_BS = (self.columns_S - first_B[:, None]).clamp(min=0)
        """Position of each token in its text; 0 on pads on the left."""


class RMSNorm(nn.Module):
    """Root mean square norm; statistics in fp32."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x_BSC: Tensor) -> Tensor:
        """Return ``[B, S, C]``."""
        return rms_norm(x_BSC, self.weight, self.eps)


class TimeEncoding(nn.Module):
    """Shared relative time encoding: encodes each token's position in its text for all Mamba mixers."""

    def __init__(self, config: FusionTreeConfig) -> None:
        super().__init__()
        self.kind, self.channels = config.srte_encoding, config.hidden_size
        if self.kind == "learnable":
            self.weight = nn.Parameter(torch.zeros(config.max_position_embeddings, config.hidden_size))

    def forward(self, positions_BS: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return the encoding ``[B, S, C]``, or None without an encoding."""
        if self.kind == "none":
            return None
        if self.kind == "sincos":
            return sincos_encoding(positions_BS, self.channels, dtype)
        longest = int(positions_BS.max()) + 1
        if longest > self.weight.shape[0]:
            raise ValueError(
                f"a text of {longest} tokens is longer than max_position_embeddings {self.weight.shape[0]}, where the "
                f"learnable time encoding ends"
            )
        return F.embedding(positions_BS, self.weight).to(dtype)


class CausalConv(nn.Module):
    """Depthwise causal convolution and SiLU."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, width))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BSC: Tensor, cache: dict[str, Tensor] | None, name: str) -> Tensor:
        """Return ``[B, S, C]``; ``cache[name]`` holds the inputs before the first token and is updated."""
        before_BKC = None if cache is None else cache.get(name)
        if cache is not None:
            look_back = self.weight.shape[1] - 1
            if before_BKC is None:
                before_BKC = x_BSC.new_zeros(x_BSC.shape[0], look_back, x_BSC.shape[2])
            inputs_BTC = torch.cat([before_BKC, x_BSC], dim=1)
            cache[name] = inputs_BTC[:, inputs_BTC.shape[1] - look_back :].detach().clone()
        return shifted_products(x_BSC, self.weight, self.bias, None, before_BKC, "silu")


class SSMParameters(nn.Module):
    """Decay, skip and step bias of the state space heads, in fp32: half precision rounds decays near one."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.dt_bias = nn.Parameter(torch.zeros(heads))


class GatedRMSNorm(RMSNorm):
    """``RMSNorm(y * silu(z))`` of each group of channels separately."""

    def __init__(self, channels: int, eps: float, groups: int) -> None:
        super().__init__(channels, eps)
        self.groups = groups

    def forward(self, y_BSC: Tensor, z_BSC: Tensor) -> Tensor:
        """Return ``[B, S, C]``."""
        return gated_rms_norm(y_BSC, z_BSC, self.weight, groups=self.groups, eps=self.eps)


class Mamba2Mixer(nn.Module):
    """Projections, convolution, scan, gated norm, output projection; B and C have a separate projection."""

    def __init__(self, config: FusionTreeConfig) -> None:
        super().__init__()
        sizes = config.mamba
        self.head_dim, self.d_state, self.chunk_size = sizes["head_dim"], sizes["d_state"], sizes["chunk_size"]
        self.dt_limits = sizes.get("dt_min"), sizes.get("dt_max")
        inner, heads = config.d_inner, config.d_inner // self.head_dim
        bc_channels = 2 * sizes["n_groups"] * self.d_state
        self.splits = [inner, inner, heads]  # z, x, dt
        self.in_proj = nn.Linear(config.hidden_size, sum(self.splits), bias=False)
        self.bc_proj = nn.Linear(config.hidden_size, bc_channels, bias=False)
        self.conv_x = CausalConv(inner, sizes["d_conv"])
        self.conv_bc = CausalConv(bc_channels, sizes["d_conv"])
        self.ssm = SSMParameters(heads)
        self.norm = GatedRMSNorm(inner, config.norm_eps, sizes["norm_groups"])
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, u_BSC: Tensor, layout: TokenLayout, cache: dict[str, Tensor] | None) -> Tensor:
        """Mix along the tokens: ``[B, S, C]``."""
        z_BSC, x_BSC, dt_BSH = self.in_proj(u_BSC).split(self.splits, dim=-1)
        bc_BSC = self.bc_proj(u_BSC)
        dt_BSH = F.softplus(dt_BSH.float() + self.ssm.dt_bias.float())
        if self.dt_limits != (None, None):
            dt_BSH = dt_BSH.clamp(*self.dt_limits)
        if layout.real_BS is not None:
            # Zeros on pads: no input to the convolution, and steps of size zero leave the state as it is.
            x_BSC, bc_BSC, dt_BSH = (t * layout.real_BS.unsqueeze(-1) for t in (x_BSC, bc_BSC, dt_BSH))
        x_BSHP = self.conv_x(x_BSC, cache, "conv_x").unflatten(-1, (-1, self.head_dim))
        bc_BSC = self.conv_bc(bc_BSC, cache, "conv_bc")
        B_BSGN, C_BSGN = (t.unflatten(-1, (-1, self.d_state)) for t in bc_BSC.chunk(2, dim=-1))
        A_H, D_H = -torch.exp(self.ssm.A_log.float()), self.ssm.D.float()
        state_BHPN = None if cache is None else cache.get("state")
        outputs = []
        tokens = max(1, TOKENS_PER_SCAN // self.chunk_size) * self.chunk_size
        for x, dt, B, C in zip(*(t.split(tokens, dim=1) for t in (x_BSHP, dt_BSH, B_BSGN, C_BSGN)), strict=True):
            y, state_BHPN = scan_segments(x, dt, A_H, B, C, D_H, self.chunk_size, initial_state_BHPN=state_BHPN)
            outputs.append(y)
        if cache is not None and state_BHPN is not None:
            cache["state"] = state_BHPN.detach()
        return self.out_proj(self.norm(torch.cat(outputs, dim=1).flatten(2), z_BSC))


class Decay(nn.Module):
    """Decay of each value head of Gated DeltaNet, in fp32."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.dt_bias = nn.Parameter(torch.zeros(heads))


class HeadNorm(RMSNorm):
    """RMS norm of each value head, then the gate ``silu(z)``."""

    def forward(self, y_BSHV: Tensor, z_BSC: Tensor) -> Tensor:
        """Return ``[B, S, C]``."""
        return norm_then_gate(y_BSHV, z_BSC, self.weight, self.eps)


class GatedDeltaNet(nn.Module):
    """Projections, convolutions, gated delta rule, gated norm, output projection."""

    def __init__(self, config: FusionTreeConfig) -> None:
        super().__init__()
        sizes = (config.mixers or {})["gated_delta_net"]
        self.key_dim, self.value_dim, self.chunk_size = sizes["key_dim"], sizes["value_dim"], sizes["chunk_size"]
        heads = round(sizes["expand"] * config.hidden_size / self.value_dim)
        values, keys = heads * self.value_dim, heads // sizes["heads_per_key"] * self.key_dim
        self.splits = [values, values, heads, heads]  # z, v, a, b
        self.in_proj = nn.Linear(config.hidden_size, sum(self.splits), bias=False)
        self.qk_proj = nn.Linear(config.hidden_size, 2 * keys, bias=False)
        self.conv_v = CausalConv(values, sizes["d_conv"])
        self.conv_qk = CausalConv(2 * keys, sizes["d_conv"])
        self.decay = Decay(heads)
        self.norm = HeadNorm(values, config.norm_eps)
        self.out_proj = nn.Linear(values, config.hidden_size, bias=False)

    def forward(self, u_BSC: Tensor, layout: TokenLayout, cache: dict[str, Tensor] | None) -> Tensor:
        """Mix along the tokens: ``[B, S, C]``."""
        z_BSC, v_BSC, a_BSH, b_BSH = self.in_proj(u_BSC).split(self.splits, dim=-1)
        qk_BSC = self.qk_proj(u_BSC)
        log_decay_BSH, beta_BSH = decay_and_beta(a_BSH, b_BSH, self.decay.A_log.float(), self.decay.dt_bias.float())
        if layout.real_BS is not None:
            # Zeros on pads: no input to the convolutions, and tokens that neither decay the state nor write to it.
            real_BS1 = layout.real_BS.unsqueeze(-1)
            v_BSC, qk_BSC, log_decay_BSH, beta_BSH = (t * real_BS1 for t in (v_BSC, qk_BSC, log_decay_BSH, beta_BSH))
        v_BSHV = self.conv_v(v_BSC, cache, "conv_v").unflatten(-1, (-1, self.value_dim))
        qk_BSGK = unit_length(self.conv_qk(qk_BSC, cache, "conv_qk").unflatten(-1, (-1, self.key_dim)))
        inputs = (*qk_BSGK.chunk(2, dim=2), v_BSHV, log_decay_BSH, beta_BSH)
        state_BHKV = None if cache is None else cache.get("delta_state")
        outputs = []
        tokens = max(1, TOKENS_PER_SCAN // self.chunk_size) * self.chunk_size
        for q, k, v, log_decay, beta in zip(*(t.split(tokens, dim=1) for t in inputs), strict=True):
            y, state_BHKV = gated_delta_segments(q, k, v, log_decay, beta, self.chunk_size, None, state_BHKV)
            outputs.append(y)
        if cache is not None and state_BHKV is not None:
            cache["delta_state"] = state_BHKV.detach()
        return self.out_proj(self.norm(torch.cat(outputs, dim=1), z_BSC))


def attend(q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, positions_BS: Tensor, window: int | None) -> Tensor:
    """Attend from each new token to itself and the real tokens before it, within ``window`` tokens (None: all).

    The queries are the last S of the T columns of keys. They are processed in blocks, each with the keys that it can
    see, so that the cost of a window is linear in the number of tokens and no mask is square.
    """
    queries, keys = q_BSHD.shape[1], k_BTKD.shape[1]
    outputs = []
    for begin in range(0, queries, QUERIES_PER_BLOCK):
        end = min(begin + QUERIES_PER_BLOCK, queries)
        high = keys - queries + end
        low = 0 if window is None else max(0, keys - queries + begin - window + 1)
        visible_BST = visible_keys(end - begin, high - low, window, positions_BS[:, begin:end], q_BSHD.device)
        seen = k_BTKD[:, low:high], v_BTKD[:, low:high]
        outputs.append(sdpa(q_BSHD[:, begin:end], *seen, visible_BST.unsqueeze(1), None))
    return torch.cat(outputs, dim=1)


def append(cache: dict[str, Tensor], name: str, new_BSKD: Tensor, layout: TokenLayout) -> Tensor:
    """Write new keys or values into the buffer ``cache[name]`` of a static cache; return all of them, ``[B, T, K, D]``.

    The buffer is allocated once for ``layout.capacity`` columns; it is enlarged only for longer texts.
    """
    rows, length, heads, width = new_BSKD.shape
    end = layout.start + length
    used = cache[name].shape[1] if name in cache else 0
    missing = max(layout.capacity or 0, end) - used
    if missing > 0:
        room = new_BSKD.new_zeros(rows, missing, heads, width)
        cache[name] = torch.cat([cache[name], room], dim=1) if used else room
    buffer = cache[name]
    buffer[:, layout.start : end] = new_BSKD.detach()
    return buffer[:, :end] if layout.start else new_BSKD


class LocalGlobalAttention(nn.Module):
    """Grouped-query attention: local heads first, then global heads; no group mixes local and global heads."""

    def __init__(self, config: FusionTreeConfig, layer: int) -> None:
        super().__init__()
        self.head_dim, self.window = config.head_dim, config.window_of_layer(layer)
        self.rotates_global = config.global_rope
        local_heads = config.num_heads - config.global_heads
        local_kv_heads = local_heads * config.num_kv_heads // config.num_heads
        self.heads = [local_heads, config.global_heads]
        self.kv_heads = [local_kv_heads, config.num_kv_heads - local_kv_heads]
        width, hidden = self.head_dim, config.hidden_size
        self.q_proj = nn.Linear(hidden, config.num_heads * width, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_kv_heads * width, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_kv_heads * width, bias=False)
        self.o_proj = nn.Linear(config.num_heads * width, hidden, bias=False)

    def forward(
        self,
        u_BSC: Tensor,
        cos_BSD: Tensor,
        sin_BSD: Tensor,
        layout: TokenLayout,
        cache: dict[str, Tensor] | None,
    ) -> Tensor:
        """Mix along the tokens: ``[B, S, C]``."""
        q_BSHD, k_BSKD, v_BSKD = (
            linear(u_BSC).unflatten(-1, (-1, self.head_dim)) for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries = self._rotated(q_BSHD, self.heads, cos_BSD, sin_BSD)
        keys = self._rotated(k_BSKD, self.kv_heads, cos_BSD, sin_BSD)
        values = v_BSKD.split(self.kv_heads, dim=2)
        outputs = []
        for name, window, q, k, v in zip(("local", "global"), (self.window, None), queries, keys, values, strict=True):
            if not q.shape[2]:
                continue
            if cache is not None and window is None and layout.capacity is not None:
                k, v = append(cache, f"{name}_k", k, layout), append(cache, f"{name}_v", v, layout)
            elif cache is not None:
                if f"{name}_k" in cache:
                    k, v = torch.cat([cache[f"{name}_k"], k], dim=1), torch.cat([cache[f"{name}_v"], v], dim=1)
                needed = 0 if window is None else max(0, k.shape[1] - window + 1)
                cache[f"{name}_k"], cache[f"{name}_v"] = k[:, needed:].detach(), v[:, needed:].detach()
            outputs.append(attend(q, k, v, layout.positions_BS, window))
        return self.o_proj(torch.cat(outputs, dim=2).flatten(2))

    def _rotated(self, x_BSHD: Tensor, heads: list[int], cos_BSD: Tensor, sin_BSD: Tensor) -> tuple[Tensor, ...]:
        """Return the local and the global of ``heads``, rotated; ``global_rope`` false: the local alone."""
        if self.rotates_global:
            return apply_rotary(x_BSHD, cos_BSD, sin_BSD).split(heads, dim=2)
        local_BSHD, global_BSHD = x_BSHD.split(heads, dim=2)
        return apply_rotary(local_BSHD, cos_BSD, sin_BSD), global_BSHD


class NormedMLP(MLP):
    """``x + mlp(norm(x))``: the MLP of a transformer."""

    def __init__(self, config: FusionTreeConfig) -> None:
        super().__init__(config)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x_BSC: Tensor) -> Tensor:
        """Return the residual stream after the MLP, ``[B, S, C]``."""
        return super().forward(self.norm(x_BSC), x_BSC)


class FusionTreeBlock(GradientCheckpointingLayer):
    """One layer. Its letter in ``layer_pattern`` selects sizes and one or two mixers, which read the same input.

    ``branch_mix`` selects what is made of the mixers' outputs, ``mlp_input`` what the MLP reads.
    """

    def __init__(self, config: FusionTreeConfig, layer: int) -> None:
        super().__init__()
        self.mixers, config = config.mixers_of_layer(layer), config.of_layer(layer)
        hidden = config.hidden_size
        self.norm = RMSNorm(hidden, config.norm_eps)
        if "mamba2" in self.mixers:
            self.mamba = Mamba2Mixer(config)
        if "gated_delta_net" in self.mixers:
            self.delta = GatedDeltaNet(config)
        if "attention" in self.mixers:
            self.attention = LocalGlobalAttention(config, layer)
        branches, self.mix = len(self.mixers), config.branch_mix
        self.branch_norm = BranchNorm(branches, hidden, config.norm_eps) if config.branch_norm else None
        self.align = Alignment(branches, hidden) if config.use_alignment else None
        self.gate = FusionGate(config) if self.mix in ("gate", "gated_sum") else None
        self.out_proj: nn.Linear | None = None
        if self.mix not in ("gated_sum", "sum"):
            self.out_proj = nn.Linear(hidden * (branches if self.mix == "concat" else 1), hidden, bias=False)
        self.mlp = NormedMLP(config) if config.mlp_input == "residual" else MLP(config)

    def forward(
        self,
        x_BSC: Tensor,
        srte_BSC: Tensor | None,
        cos_BSD: Tensor,
        sin_BSD: Tensor,
        layout: TokenLayout,
        cache: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the residual stream after this layer; ``cache`` holds this layer's cached tensors."""
        u_BSC = self.norm(x_BSC)
        outputs = []
        timed_BSC = u_BSC if srte_BSC is None else u_BSC + srte_BSC
        for mixer in self.mixers:
            if mixer == "attention":
                outputs.append(self.attention(u_BSC, cos_BSD, sin_BSD, layout, cache))
            else:
                recurrent = self.mamba if mixer == "mamba2" else self.delta
                outputs.append(recurrent(timed_BSC, layout, cache))
        outputs_BSC = torch.cat(outputs, dim=-1)
        if self.branch_norm is not None:
            outputs_BSC = self.branch_norm(outputs_BSC)
        if isinstance(self.mlp, NormedMLP):
            return self.mlp(x_BSC + self._mixed(outputs_BSC))
        z_BSC = self._aligned(outputs_BSC)
        return x_BSC + self._mixed(outputs_BSC, z_BSC) + self.mlp(z_BSC)

    def _aligned(self, outputs_BSC: Tensor) -> Tensor:
        """Return the input of gate and MLP, ``[B, S, C]``."""
        if self.align is not None:
            return self.align(outputs_BSC)[0]
        return even_mix(outputs_BSC, "sum", len(self.mixers)) / 2  # a missing mixer counts as zeros

    def _mixed(self, outputs_BSC: Tensor, z_BSC: Tensor | None = None) -> Tensor:
        """Return what the mixers add to the residual stream, ``[B, S, C]``; ``z``: see :meth:`_aligned`."""
        if self.gate is not None:
            logits_BSC = self.gate(self._aligned(outputs_BSC) if z_BSC is None else z_BSC)
            given = "both" if len(self.mixers) == 2 else "second" if self.mixers == ["attention"] else "first"
            mixed_BSC = mix(logits_BSC, outputs_BSC, given)
        else:
            mixed_BSC = even_mix(outputs_BSC, self.mix, len(self.mixers))
        return mixed_BSC if self.out_proj is None else self.out_proj(mixed_BSC)


class FusionTreeCache:
    """Convolution inputs and state of each recurrent mixer, keys and values of each attention.

    All rows of a batch end in the same column; shorter texts are padded on the left.
    """

    is_compileable = False

    def __init__(self, num_layers: int, capacity: int | None = None) -> None:
        """Create an empty cache; with a ``capacity``, global heads get buffers of that many columns once (static)."""
        self.capacity = capacity
        self.columns = 0
        """Tokens per row, pads included."""
        self.first_B: Tensor | None = None
        """Column of each row's first real token."""
        self.layers: list[dict[str, Tensor]] = [{} for _ in range(num_layers)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens per row, pads included."""
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row i by row ``beam_idx[i]`` (beam search)."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        self._map(lambda tensor: tensor[indices])

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.first_B = None if self.first_B is None else change(self.first_B)
        self.layers = [{name: change(tensor) for name, tensor in layer.items()} for layer in self.layers]


class FusionTreePreTrainedModel(PreTrainedModel):
    """Initial values and the properties that transformers reads."""

    config_class = FusionTreeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FusionTreeBlock"]
    _keep_in_fp32_modules_strict = ["ssm", "decay"]
    _is_stateful = True

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.base_model.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.base_model.embed = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0.0, std)
        elif isinstance(module, RMSNorm | BranchNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, CausalConv):
            bound = module.weight.shape[1] ** -0.5
            module.weight.uniform_(-bound, bound)
            module.bias.zero_()
        elif isinstance(module, SSMParameters | Decay):
            module.A_log.uniform_(1.0, 16.0).log_()
            if isinstance(module, SSMParameters):
                module.D.fill_(1.0)
            dt = module.dt_bias.uniform_(math.log(0.001), math.log(0.1)).exp()
            module.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        elif isinstance(module, TimeEncoding) and module.kind == "learnable":
            module.weight.normal_(0.0, std)


class FusionTreeModel(FusionTreePreTrainedModel):
    """Embedding, blocks, norm."""

    def __init__(self, config: FusionTreeConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(FusionTreeBlock(config, layer) for layer in range(config.num_layers))
        self.srte = TimeEncoding(config)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: FusionTreeCache | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Return the normed hidden states.

        Args:
            input_ids: tokens ``[B, S]``.
            attention_mask: 1 on real tokens, 0 on pads; the real tokens of a row are contiguous.
            past_key_values: cache of an earlier call whose texts the tokens continue; updated in place.
            inputs_embeds: embedded tokens ``[B, S, C]`` instead of ``input_ids``.
            position_ids: not needed; if given, they must count the real tokens of each row from 0.
            use_cache: return a cache; None means as configured, and none for rows padded on the right.
            output_hidden_states: also return the residual stream before every layer and after the final norm.
            return_dict: False returns a tuple.
            kwargs: ignored, except for :data:`PACKED`.

        Raises:
            ValueError: a row has several texts, or the mask does not fit the tokens and the cache.
        """
        packed = [name for name in PACKED if kwargs.get(name) is not None]
        if packed:
            raise ValueError(f"{packed[0]} marks several texts in a row; give each text a row of its own")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BSC = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if self.gradient_checkpointing and self.training:
            use_cache = False  # recomputation would update a cache twice
        cache = past_key_values
        if use_cache is None:  # a cache cannot continue rows that end in pads, and nobody asked for one
            use_cache = self.config.use_cache and (attention_mask is None or bool(attention_mask[:, -1].all()))
        if cache is None and use_cache:
            cache = FusionTreeCache(self.config.num_layers)
        elif cache is not None and not isinstance(cache, FusionTreeCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}; pass the cache that a call returned")
        layout = self._lay_out(x_BSC, attention_mask, position_ids, cache)
        cos_BSD, sin_BSD = rotary_tables(layout.positions_BS, self.config.head_dim, self.config.rope_theta)
        srte_BSC = self.srte(layout.positions_BS, x_BSC.dtype)
        streams = []
        for layer, block in enumerate(self.layers):
            streams.append(x_BSC)
            x_BSC = block(x_BSC, srte_BSC, cos_BSD, sin_BSD, layout, None if cache is None else cache.layers[layer])
        x_BSC = self.norm(x_BSC)
        if cache is not None:
            cache.columns += x_BSC.shape[1]
        output = BaseModelOutputWithPast(
            last_hidden_state=x_BSC,
            past_key_values=cache,
            hidden_states=(*streams, x_BSC) if output_hidden_states else None,
        )
        return output if return_dict is not False else output.to_tuple()

    @staticmethod
    def _lay_out(
        x_BSC: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: FusionTreeCache | None
    ) -> TokenLayout:
        start, first_B, capacity = (0, None, None) if cache is None else (cache.columns, cache.first_B, cache.capacity)
        layout = TokenLayout(*x_BSC.shape[:2], attention_mask, start, first_B, x_BSC.device, capacity)
        if cache is not None:
            if layout.real_BS is not None and not bool(layout.real_BS[:, -1].all()):
                raise ValueError(
                    "rows are padded on the right, so a text cannot be continued; use padding_side='left', or "
                    "use_cache=False for a single forward"
                )
            cache.first_B = layout.first_B
        if position_ids is not None:
            equal_BS = position_ids == layout.positions_BS
            if not bool((equal_BS if layout.real_BS is None else equal_BS[layout.real_BS]).all()):
                raise ValueError("position_ids are not those of one text per row; give each text a row of its own")
        return layout


class FusionTreeForCausalLM(FusionTreePreTrainedModel, GenerationMixin):
    """The language model: hidden states, head, loss."""

    _tied_weights_keys = {"lm_head.weight": "model.embed.weight"}

    def __init__(self, config: FusionTreeConfig) -> None:
        super().__init__(config)
        self.model = FusionTreeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first forward creates a FusionTreeCache

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *arguments: Any, **options: Any
    ) -> Any:
        """Create the static cache that ``generate(cache_implementation="static")`` asks for."""
        static = generation_config.cache_implementation == "static" and generation_config.use_cache is not False
        if not static or model_kwargs.get("past_key_values") is not None:
            parent: Any = super()
            return parent._prepare_cache_for_generation(generation_config, model_kwargs, *arguments, **options)
        columns = options.get("max_cache_length", arguments[-1] if arguments else 0)
        model_kwargs["past_key_values"] = FusionTreeCache(self.config.num_layers, columns)
        return None

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: FusionTreeCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of the next forward: the tokens that the cache does not hold, with all pads first."""
        tokens: dict[str, Any] = {"input_ids": input_ids}
        if past_key_values is not None and past_key_values.columns:
            # After inputs_embeds, input_ids holds only the new tokens.
            new = (attention_mask if attention_mask is not None else input_ids).shape[1] - past_key_values.columns
            tokens = {"input_ids": input_ids[:, -max(1, new) :]}
        elif inputs_embeds is not None:
            tokens = {"inputs_embeds": inputs_embeds}
        empty = past_key_values is None or not past_key_values.columns
        if empty and attention_mask is not None and not bool(attention_mask.all()):
            order_BS = attention_mask.bool().int().argsort(dim=1, stable=True)
            row_B1 = torch.arange(len(order_BS), device=order_BS.device)[:, None]
            tokens = {name: values[row_B1, order_BS] for name, values in tokens.items()}
            attention_mask = attention_mask[row_B1, order_BS]
        return tokens | {
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": 1 if logits_to_keep is None else logits_to_keep,
        }

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: FusionTreeCache | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Return the logits ``[B, S, V]`` and, with ``labels``, the mean loss.

        ``labels`` are the input tokens, which are shifted here, with -100 on tokens without loss; pads have none, as in
        training. ``logits_to_keep`` is the number of last tokens to compute logits for (0: all), or their indices.
        :class:`FusionTreeModel` describes the other arguments; ``kwargs`` go to the loss function.
        """
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **{name: kwargs.pop(name) for name in PACKED if name in kwargs},
        )
        hidden_BSC = output.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden_BSC = hidden_BSC[:, logits_to_keep]
        elif logits_to_keep:
            hidden_BSC = hidden_BSC[:, -logits_to_keep:]
        logits_BSV = self.lm_head(hidden_BSC)
        loss = None
        if labels is not None:
            if attention_mask is not None:
                labels = labels.masked_fill(attention_mask[:, -labels.shape[1] :] == 0, -100)
            loss = self.loss_function(logits_BSV, labels, vocab_size=self.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BSV,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )
        return result if return_dict is not False else result.to_tuple()


__all__ = ["FusionTreeForCausalLM", "FusionTreeModel", "FusionTreePreTrainedModel"]
