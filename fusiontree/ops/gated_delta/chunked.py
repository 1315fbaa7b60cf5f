"""The gated delta rule by scan chunks in plain PyTorch, for any device; autograd computes the gradients.

Each token writes ``beta (v - recalled)``, where ``recalled`` depends on what the previous tokens of its chunk wrote. So
the writes of a chunk solve a unit lower triangular system (the UT transform; Yang, Wang, Zhang, Shen and Kim 2024,
arXiv:2406.06484, section 3, with decays as in arXiv:2412.06464). The solution is linear in the state before the chunk:
``written = u - w state``. Only this state is passed from chunk to chunk.

Shape legend: B rows, S tokens, c chunks, Q tokens of a chunk, G key heads, R value heads of a key head, H = G R value
heads, K channels of a key, V channels of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusiontree.ops.gated_delta.reference import DeltaInputs
from fusiontree.ops.ssd.reference import ChunkMarks, in_chunks


def gated_delta_chunked(inputs: DeltaInputs) -> tuple[Tensor, Tensor]:
    """Compute :func:`fusiontree.ops.gated_delta.gated_delta_rule`."""
    segments_BS = None if inputs.documents is None else inputs.documents.segments_BS
    return gated_delta_segments(*inputs[:6], segments_BS, inputs.initial_state_BHKV)


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
