"""Backward Triton kernels of the scan (GPU), with the formulas and names of :mod:`fusiontree.ops.ssd.kernels`.

C.B, its gradient and masks are ``[j, i]`` here: token i sees token j. Two kernels recompute C.B, because a single
kernel with C.B, its gradient and the gradients of x would need more registers than there are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusiontree.ops.ssd.kernels import segment_after, segment_before, segments_of, tokens_of


@triton.jit
def _visible(segment, packed: tl.constexpr, Q: tl.constexpr):
    """Return the mask ``[j, i]``: True if token i sees token j."""
    q = tl.arange(0, Q)
    visible = q[None, :] >= q[:, None]
    if packed:
        visible = visible & (segment[None, :] == segment[:, None])
    return visible


@triton.jit
def _fade(decay_j, decay_i):
    """Return ``[j, i]``, the decay from token j to token i; clamped, as for i < j the difference could overflow."""
    return tl.exp2(tl.minimum(decay_i[None, :] - decay_j[:, None], 0.0))


@triton.jit
def _inputs_of_half(
    x_ptr, dy_ptr, B_ptr, C_ptr, D_ptr, decay_ptr, step_ptr, segment_ptr, dstates_ptr,
    dx_ptr, dstep_ptr, to_state_ptr, skip_ptr,
    x_token, x_head, dy_token, dy_head, B_token, C_token, length, chunks, heads, row, chunk, block,
    LATER: tl.constexpr, packed: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = Q // 2
    p, n, q = tl.arange(0, P), tl.arange(0, N), tl.arange(0, HALF)
    begin = chunk.to(tl.int64) * Q
    first = begin
    if not LATER:
        first += HALF
    later = first + HALF
    B = tokens_of(B_ptr, first, B_token, length, HALF, N)
    segment, last = q, 0
    if packed:
        segment = segments_of(segment_ptr, row, first, length, HALF)
        last = segment_after(segment_ptr, row, begin, length, Q)
    scores = tl.dot(B, tl.trans(tokens_of(C_ptr, first, C_token, length, HALF, N)), input_precision="ieee")
    scores = tl.where(_visible(segment, packed, HALF), scores, 0.0)
    if LATER:
        scores_later = tl.dot(B, tl.trans(tokens_of(C_ptr, later, C_token, length, HALF, N)), input_precision="ieee")
        if packed:
            segment_later = segments_of(segment_ptr, row, later, length, HALF)
            scores_later = tl.where(segment_later[None, :] == segment[:, None], scores_later, 0.0)
    dx_ptr += (row * length + (first + q)[:, None]) * (heads * P) + p[None, :]
    for k in range(HEADS):
        head = block * HEADS + k
        index = row * heads + head
        tokens = index * (chunks * Q) + first + q
        decay = tl.load(decay_ptr + tokens)
        step = tl.load(step_ptr + tokens)
        to_end = tl.exp2(tl.load(decay_ptr + index * (chunks * Q) + begin + Q - 1) - decay)
        if packed:
            to_end = tl.where(segment == last, to_end, 0.0)
        dstate = tl.load(dstates_ptr + ((row * chunks + chunk) * heads + head) * (P * N) + p[None, :] * N + n[:, None])
        du = tl.dot(B, dstate, input_precision="ieee") * to_end[:, None]
        x = tokens_of(x_ptr + head * x_head, first, x_token, length, HALF, P)
        tl.store(to_state_ptr + tokens, tl.sum(du * x, 1) * step)
        dy = tokens_of(dy_ptr + head * dy_head, first, dy_token, length, HALF, P)
        du = tl.dot((scores * _fade(decay, decay)).to(dy.dtype), dy, du, input_precision="ieee")
        if LATER:
            fade = _fade(decay, tl.load(decay_ptr + tokens + HALF))
            dy_later = tokens_of(dy_ptr + head * dy_head, later, dy_token, length, HALF, P)
            du = tl.dot((scores_later * fade).to(dy.dtype), dy_later, du, input_precision="ieee")
        tl.store(dstep_ptr + tokens, tl.sum(du * x, 1))
        dx = du * step[:, None] + tl.load(D_ptr + head) * dy
        tl.store(dx_ptr + head * P, dx.to(dx_ptr.dtype.element_ty), mask=(first + q)[:, None] < length)
        tl.store(skip_ptr + tokens, tl.sum(x.to(tl.float32) * dy, 1))


@triton.jit
def chunk_inputs_backward(
    x_ptr, dy_ptr, B_ptr, C_ptr, D_ptr, decay_ptr, step_ptr, segment_ptr, dstates_ptr,
    dx_ptr, dstep_ptr, to_state_ptr, skip_ptr,
    x_row, x_token, x_head, dy_row, dy_token, dy_head, B_row, B_token, B_group, C_row, C_token, C_group,
    length, chunks, heads, heads_a_group,
    packed: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of x, and of dt except through the decay, for ``HEADS`` heads and half a chunk per program.

    ``to_state`` is each token's log decay gradient through the next state, ``skip`` is x . dy. A program handles half a
    chunk, because all tokens of the chunk see the first half, but only the second half sees itself.
    Grid (2 H / HEADS, c, B).
    """
    block = tl.program_id(0) // 2
    row = tl.program_id(2).to(tl.int64)
    group = block * HEADS // heads_a_group
    x_ptr, dy_ptr = x_ptr + row * x_row, dy_ptr + row * dy_row
    B_ptr, C_ptr = B_ptr + row * B_row + group * B_group, C_ptr + row * C_row + group * C_group
    if tl.program_id(0) % 2 == 0:
        _inputs_of_half(
            x_ptr, dy_ptr, B_ptr, C_ptr, D_ptr, decay_ptr, step_ptr, segment_ptr, dstates_ptr,
            dx_ptr, dstep_ptr, to_state_ptr, skip_ptr, x_token, x_head, dy_token, dy_head, B_token, C_token,
            length, chunks, heads, row, tl.program_id(1), block, True, packed, Q, P, N, HEADS,
        )  # fmt: skip
    else:
        _inputs_of_half(
            x_ptr, dy_ptr, B_ptr, C_ptr, D_ptr, decay_ptr, step_ptr, segment_ptr, dstates_ptr,
            dx_ptr, dstep_ptr, to_state_ptr, skip_ptr, x_token, x_head, dy_token, dy_head, B_token, C_token,
            length, chunks, heads, row, tl.program_id(1), block, False, packed, Q, P, N, HEADS,
        )  # fmt: skip


@triton.jit
def _scores_of_half(
    x_ptr, dy_ptr, B_ptr, C_ptr, decay_ptr, step_ptr, segment_ptr, dscores_ptr, ddecay_ptr, dlater_ptr,
    x_token, x_head, dy_token, dy_head, B_token, C_token, length, chunks, heads, row, chunk, block,
    LATER: tl.constexpr, packed: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = Q // 2
    q = tl.arange(0, HALF)
    first = chunk.to(tl.int64) * Q
    if not LATER:
        first += HALF
    later = first + HALF
    B = tokens_of(B_ptr, first, B_token, length, HALF, N)
    segment = q
    if packed:
        segment = segments_of(segment_ptr, row, first, length, HALF)
    visible = _visible(segment, packed, HALF)
    scores = tl.dot(B, tl.trans(tokens_of(C_ptr, first, C_token, length, HALF, N)), input_precision="ieee")
    scores = tl.where(visible, scores, 0.0)
    dscores = tl.zeros([HALF, HALF], dtype=tl.float32)
    if LATER:
        scores_later = tl.dot(B, tl.trans(tokens_of(C_ptr, later, C_token, length, HALF, N)), input_precision="ieee")
        if packed:
            segment_later = segments_of(segment_ptr, row, later, length, HALF)
            scores_later = tl.where(segment_later[None, :] == segment[:, None], scores_later, 0.0)
        dscores_later = tl.zeros([HALF, HALF], dtype=tl.float32)
    for k in range(HEADS):
        head = block * HEADS + k
        tokens = (row * heads + head) * (chunks * Q) + first + q
        decay = tl.load(decay_ptr + tokens)
        step = tl.load(step_ptr + tokens)
        x = tokens_of(x_ptr + head * x_head, first, x_token, length, HALF, P)
        dy = tokens_of(dy_ptr + head * dy_head, first, dy_token, length, HALF, P)
        dweights = tl.dot(x, tl.trans(dy), input_precision="ieee") * step[:, None] * _fade(decay, decay)
        dscores += dweights
        moved = dweights * scores  # gradient of the log decay between tokens j and i
        ddecay = tl.sum(moved, 0) - tl.sum(moved, 1)
        if LATER:
            dy_later = tokens_of(dy_ptr + head * dy_head, later, dy_token, length, HALF, P)
            fade = _fade(decay, tl.load(decay_ptr + tokens + HALF))
            dweights = tl.dot(x, tl.trans(dy_later), input_precision="ieee") * step[:, None] * fade
            dscores_later += dweights
            moved = dweights * scores_later
            ddecay -= tl.sum(moved, 1)
            tl.store(dlater_ptr + tokens + HALF, tl.sum(moved, 0))
        tl.store(ddecay_ptr + tokens, ddecay)
    tile = dscores_ptr + q[:, None] * Q + q[None, :]
    if not LATER:
        tile += HALF * Q + HALF
    dscores = tl.where(visible, dscores, 0.0)
    tl.store(tile, dscores.to(dscores_ptr.dtype.element_ty))
    if LATER:
        if packed:
            dscores_later = tl.where(segment_later[None, :] == segment[:, None], dscores_later, 0.0)
        tl.store(tile + HALF, dscores_later.to(dscores_ptr.dtype.element_ty))


@triton.jit
def chunk_scores_backward(
    x_ptr, dy_ptr, B_ptr, C_ptr, decay_ptr, step_ptr, segment_ptr, dscores_ptr, ddecay_ptr, dlater_ptr,
    x_row, x_token, x_head, dy_row, dy_token, dy_head, B_row, B_token, B_group, C_row, C_token, C_group,
    length, chunks, heads, heads_a_group,
    packed: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of C.B ``[j, i]``, summed over ``HEADS`` heads of a group, and of decays inside the chunk.

    ``dlater`` has the contributions of the first half to tokens of the second half, ``ddecay`` all others. The quarter
    of ``dscores`` with i in the first half and j in the second is zero and is not written.
    Grid (2 H / HEADS, c, B).
    """
    block, blocks = tl.program_id(0) // 2, tl.num_programs(0) // 2
    row = tl.program_id(2).to(tl.int64)
    group = block * HEADS // heads_a_group
    x_ptr, dy_ptr = x_ptr + row * x_row, dy_ptr + row * dy_row
    B_ptr, C_ptr = B_ptr + row * B_row + group * B_group, C_ptr + row * C_row + group * C_group
    dscores_ptr += ((row * chunks + tl.program_id(1)) * blocks + block) * (Q * Q)
    if tl.program_id(0) % 2 == 0:
        _scores_of_half(
            x_ptr, dy_ptr, B_ptr, C_ptr, decay_ptr, step_ptr, segment_ptr, dscores_ptr, ddecay_ptr, dlater_ptr,
            x_token, x_head, dy_token, dy_head, B_token, C_token, length, chunks, heads, row, tl.program_id(1), block,
            True, packed, Q, P, N, HEADS,
        )  # fmt: skip
    else:
        _scores_of_half(
            x_ptr, dy_ptr, B_ptr, C_ptr, decay_ptr, step_ptr, segment_ptr, dscores_ptr, ddecay_ptr, dlater_ptr,
            x_token, x_head, dy_token, dy_head, B_token, C_token, length, chunks, heads, row, tl.program_id(1), block,
            False, packed, Q, P, N, HEADS,
        )  # fmt: skip


@triton.jit
def chunk_group_backward(
    x_ptr, w_ptr, other_ptr, decay_ptr, step_ptr, segment_ptr, states_ptr, dscores_ptr, dw_ptr, from_state_ptr,
    x_row, x_token, x_head, w_row, w_token, w_group, other_row, other_token, other_group,
    dw_row, dw_token, length, chunks, heads, heads_a_group, blocks,
    of_C: tl.constexpr, packed: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of C or of B, as ``of_C`` says.

    For C, ``x`` is the gradient of y and ``states`` are the states; for B, ``x`` is x and ``states`` are the gradients
    of the states. For C also writes ``from_state``, each token's log decay gradient through the state before the chunk.
    The heads of a group are divided into ``blocks``, each with a separate ``dscores``. Grid (G, c, B).
    """
    group, chunk = tl.program_id(0), tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    p, n, q = tl.arange(0, P), tl.arange(0, N), tl.arange(0, Q)
    first = chunk.to(tl.int64) * Q
    inside = first + q < length
    other = tokens_of(other_ptr + row * other_row + group * other_group, first, other_token, length, Q, N)
    gradient = tl.zeros([Q, N], dtype=tl.float32)
    for block in range(blocks):
        source = dscores_ptr + ((row * chunks + chunk) * (tl.num_programs(0) * blocks) + group * blocks + block) * (
            Q * Q
        )
        if of_C:  # dscores is [j, i], and zero where i is before j
            dscores = tl.load(source + q[None, :] * Q + q[:, None], mask=q[None, :] <= q[:, None], other=0.0)
        else:
            dscores = tl.load(source + q[:, None] * Q + q[None, :], mask=q[:, None] <= q[None, :], other=0.0)
        gradient = tl.dot(dscores, other, gradient, input_precision="ieee")
    segment, border = q, 0
    if packed:
        segment = segments_of(segment_ptr, row, first, length, Q)
        if of_C:
            border = segment_before(segment_ptr, row, first, length)
        else:
            border = segment_after(segment_ptr, row, first, length, Q)
    x_ptr += row * x_row
    for k in range(heads_a_group):
        head = group * heads_a_group + k
        index = row * heads + head
        tokens = index * (chunks * Q) + first + q
        decay = tl.load(decay_ptr + tokens)
        whole = tl.load(decay_ptr + index * (chunks * Q) + first + Q - 1)
        if of_C:
            scale = tl.exp2(decay)
        else:
            scale = tl.exp2(whole - decay) * tl.load(step_ptr + tokens)
        if packed:
            scale = tl.where(segment == border, scale, 0.0)
        x = tokens_of(x_ptr + head * x_head, first, x_token, length, Q, P)
        place = ((row * chunks + chunk) * heads + head) * (P * N) + p[:, None] * N + n[None, :]
        state = tl.load(states_ptr + place)
        part = tl.dot(x, state, input_precision="ieee") * scale[:, None]
        gradient += part
        if of_C:
            w = tokens_of(w_ptr + row * w_row + group * w_group, first, w_token, length, Q, N)
            tl.store(from_state_ptr + tokens, tl.sum(part * w, 1))
    out = dw_ptr + row * dw_row + (first + q)[:, None] * dw_token + group * N + n[None, :]
    tl.store(out, gradient.to(dw_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def chunk_decay_backward(
    ddecay_ptr, dlater_ptr, from_state_ptr, to_state_ptr, dstep_ptr, dkeep_ptr, more_ptr, decay_ptr, step_ptr, A_ptr,
    segment_ptr, ddt_ptr, dA_ptr, length, chunks, heads,
    has_more: tl.constexpr, packed: tl.constexpr, Q: tl.constexpr, BH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of dt ``[B, S, H]`` and, for each chunk, of A. Grid (c, H / BH, B).

    l_t enters a_i for all i >= t of its chunk, and the chunk's total log decay a_Q. ``more [B, H]`` is added to the
    gradient of every chunk's total log decay.
    """
    chunk = tl.program_id(0).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    there = h < heads
    q = tl.arange(0, Q)
    index = row * heads + h
    tokens = index[:, None] * (chunks * Q) + (chunk * Q + q)[None, :]
    mine = there[:, None]
    to_here = tl.load(ddecay_ptr + tokens, mask=mine, other=0.0)
    to_here += tl.load(dlater_ptr + tokens, mask=mine & (q[None, :] >= Q // 2), other=0.0)
    to_here += tl.load(from_state_ptr + tokens, mask=mine, other=0.0)
    to_state = tl.load(to_state_ptr + tokens, mask=mine, other=0.0)
    parts = (index * chunks + chunk)[:, None] * PARTS + tl.arange(0, PARTS)[None, :]
    whole = tl.sum(tl.load(dkeep_ptr + parts, mask=mine, other=0.0), 1)
    whole *= tl.exp2(tl.load(decay_ptr + index * (chunks * Q) + chunk * Q + Q - 1, mask=there, other=0.0))
    if packed:
        last = segment_after(segment_ptr, row, chunk * Q, length, Q)
        whole = tl.where(last == segment_before(segment_ptr, row, chunk * Q, length), whole, 0.0)
    if has_more:
        whole += tl.load(more_ptr + index, mask=there, other=0.0)
    # Contributions of a_i for i >= t, of tokens before t to the next state, and of the chunk's total log decay.
    dlog = tl.cumsum(to_here, axis=1, reverse=True) + (tl.cumsum(to_state, axis=1) - to_state) + whole[:, None]
    step = tl.load(step_ptr + tokens, mask=mine, other=0.0)
    A = tl.load(A_ptr + h, mask=there, other=0.0)
    ddt = tl.load(dstep_ptr + tokens, mask=mine, other=0.0) + A[:, None] * dlog
    t = chunk * Q + q
    tl.store(
        ddt_ptr + (row * length + t[None, :]) * heads + h[:, None], ddt, mask=there[:, None] & (t[None, :] < length)
    )
    tl.store(dA_ptr + (row * chunks + chunk) * heads + h, tl.sum(dlog * step, 1), mask=there)
