"""Forward Triton kernels of the chunked scan (GPU); :mod:`fusiontree.ops.ssd.kernels_backward` has the backward.

A row is split into scan chunks of Q tokens. Let l_t = A dt_t, a_t the sum of l over the chunk up to and including t,
and h the state before the chunk. Each head computes (Dao and Gu 2024, "Transformers are SSMs", section 6)

    y_i    = sum_{j <= i} (C_i . B_j) exp(a_i - a_j) dt_j x_j  +  exp(a_i) h C_i  +  D x_i
    h_next = exp(a_Q) h  +  sum_j exp(a_Q - a_j) dt_j x_j B_j^T

and the backward kernels compute the gradients of these two lines. One program processes the chunks of a row in order
and keeps the state in registers (:func:`chunk_walk`; in the backward pass it runs from the last chunk to the first and
carries the gradient of the state); all other work is parallel over chunks. C.B is not written to memory; its gradient
is written once per group of heads, in 16 bits.

Where documents start inside a row, terms between tokens of different segments are masked, so no log decay of minus
infinity is ever summed. Offsets of rows, tokens and chunks are 64-bit; heads and channels of a token are contiguous.

Logarithms (``decay``) are to base 2, for exp2. Padded tokens at a row's end have dt = 0 and load as zeros.

Shape legend: B rows, S tokens, T tokens padded to whole chunks, c chunks, Q tokens of a chunk, H heads, G groups,
P channels of a head, N state size. ``decay``, ``step`` and gradients with one value per token and head are [B, H, T].
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def segments_of(segment_ptr, row, first, length, Q: tl.constexpr):
    """Load the segments of the Q tokens from ``first`` on; padded tokens get the last token's segment."""
    return tl.load(segment_ptr + row * length + tl.minimum(first + tl.arange(0, Q), length - 1))


@triton.jit
def segment_after(segment_ptr, row, first, length, Q: tl.constexpr):
    """Load the segment of a chunk's last token."""
    return tl.load(segment_ptr + row * length + tl.minimum(first + Q, length) - 1)


@triton.jit
def segment_before(segment_ptr, row, first, length):
    """Load the segment of the token before a chunk; 0 before the row."""
    return tl.load(segment_ptr + row * length + first - 1, mask=first > 0, other=0)


@triton.jit
def tokens_of(x_ptr, first, x_token, length, Q: tl.constexpr, CHANNELS: tl.constexpr):
    """Load ``[Q, CHANNELS]``: the chunk that begins with token ``first``; zeros beyond the row."""
    t = first + tl.arange(0, Q)
    return tl.load(x_ptr + t[:, None] * x_token + tl.arange(0, CHANNELS)[None, :], mask=t[:, None] < length, other=0.0)


@triton.jit
def chunk_decay(
    dt_ptr, A_ptr, decay_ptr, step_ptr, dt_row, dt_token, length, chunks, heads, Q: tl.constexpr, BH: tl.constexpr
):
    """Compute the cumulative log decays of each chunk, and transpose dt ``[B, S, H]`` to ``[B, H, T]``.

    Grid (c, H / BH, B).
    """
    row = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    t = tl.program_id(0).to(tl.int64) * Q + tl.arange(0, Q)
    there = h[None, :] < heads
    dt = tl.load(
        dt_ptr + row * dt_row + t[:, None] * dt_token + h[None, :], mask=(t[:, None] < length) & there, other=0.0
    )
    A = tl.load(A_ptr + h, mask=h < heads, other=0.0)
    decay = tl.cumsum(dt * (A * _LOG2E)[None, :], axis=0)
    out = (row * heads + h[None, :]) * (chunks * Q) + t[:, None]
    tl.store(decay_ptr + out, decay, mask=there)
    tl.store(step_ptr + out, dt, mask=there)


@triton.jit
def chunk_walk(
    x_ptr, w_ptr, decay_ptr, step_ptr, segment_ptr, begin_ptr, states_ptr, end_ptr, kept_ptr, total_ptr,
    before_ptr, dkeep_ptr, x_row, x_token, x_head, w_row, w_token, w_group, length, chunks, heads, heads_a_group,
    backward: tl.constexpr, has_begin: tl.constexpr, packed: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write the state before every chunk; grid (N / BN, H, B).

    Backward: write the gradient of the state after every chunk, from the last chunk to the first; then x is the
    gradient of y, and w is C. ``dkeep [B, H, c, N / BN, P]`` are partial sums of its product with the state before the
    chunk (``before``): the gradient of the chunk's decay factor. ``begin`` is the initial state (gradient), ``kept``
    the factor with which it enters each chunk's state; ``end`` and ``total`` are the state and the factor after the
    last step.
    """
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    index = row * heads + head
    p, n, q = tl.arange(0, P), tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, Q)
    tile = p[:, None] * N + n[None, :]
    x_ptr += row * x_row + head * x_head
    w_ptr += row * w_row + (head // heads_a_group) * w_group
    decay_ptr += index * (chunks * Q)
    step_ptr += index * (chunks * Q)
    state = tl.zeros([P, BN], dtype=tl.float32)
    if has_begin:
        state += tl.load(begin_ptr + index * (P * N) + tile)
    kept = 1.0
    if backward:
        ahead = tl.load(before_ptr + ((row * chunks + chunks - 1) * heads + head) * (P * N) + tile)
    for i in range(chunks):
        chunk = i
        if backward:
            chunk = chunks - 1 - i
            product = tl.sum(state * ahead, 1)
            tl.store(dkeep_ptr + ((index * chunks + chunk) * tl.num_programs(0) + tl.program_id(0)) * P + p, product)
            # Prefetch: the value for the next chunk is not needed yet.
            place = (row * chunks + tl.maximum(chunk - 1, 0)) * heads + head
            ahead = tl.load(before_ptr + place * (P * N) + tile)
        first = row * 0 + chunk * Q  # 64 bits
        tl.store(
            states_ptr + ((row * chunks + chunk) * heads + head) * (P * N) + tile,
            state.to(states_ptr.dtype.element_ty),
        )
        tl.store(kept_ptr + index * chunks + chunk, kept, mask=tl.program_id(0) == 0)
        inside = first + q < length
        decay = tl.load(decay_ptr + first + q)
        whole = tl.load(decay_ptr + first + Q - 1)
        keep = tl.exp2(whole)
        if backward:
            scale = tl.exp2(decay)
        else:
            scale = tl.exp2(whole - decay) * tl.load(step_ptr + first + q)
        if packed:
            segment = segments_of(segment_ptr, row, first, length, Q)
            last = segment_after(segment_ptr, row, first, length, Q)
            before = segment_before(segment_ptr, row, first, length)
            if backward:
                scale = tl.where(segment == before, scale, 0.0)
            else:
                scale = tl.where(segment == last, scale, 0.0)
            keep = tl.where(last == before, keep, 0.0)
        x = tl.load(x_ptr + (first + q)[None, :] * x_token + p[:, None], mask=inside[None, :], other=0.0)
        w = tl.load(w_ptr + (first + q)[:, None] * w_token + n[None, :], mask=inside[:, None], other=0.0)
        w = (w * scale[:, None]).to(x.dtype)
        state = tl.dot(x, w, state * keep, input_precision="ieee")
        kept = kept * keep
    tl.store(end_ptr + index * (P * N) + tile, state)
    tl.store(total_ptr + index, kept, mask=tl.program_id(0) == 0)


@triton.jit
def chunk_add_state(
    states_ptr, state_ptr, kept_ptr, before_ptr, dkeep_ptr, chunks, heads, parts,
    backward: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """``states += kept * state``, for an initial state unknown during :func:`chunk_walk`; also updates ``dkeep``.

    Grid (c, H, B).
    """
    chunk, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    index = row * heads + head
    kept = tl.load(kept_ptr + index * chunks + chunk)
    if kept > 0.0:
        k = tl.arange(0, SIZE)
        place = ((row * chunks + chunk) * heads + head) * SIZE + k
        added = kept * tl.load(state_ptr + index * SIZE + k)
        value = tl.load(states_ptr + place).to(tl.float32) + added
        tl.store(states_ptr + place, value.to(states_ptr.dtype.element_ty))
        if backward:
            target = dkeep_ptr + (index * chunks + chunk) * parts
            tl.store(target, tl.load(target) + tl.sum(added * tl.load(before_ptr + place)))


@triton.jit
def chunk_outputs(
    x_ptr, B_ptr, C_ptr, D_ptr, decay_ptr, step_ptr, segment_ptr, states_ptr, y_ptr,
    x_row, x_token, x_head, B_row, B_token, B_group, C_row, C_token, C_group,
    length, chunks, heads, heads_a_group,
    packed: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Compute y of ``HEADS`` heads of one group; grid (H / HEADS, c, B)."""
    chunk = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    group = tl.program_id(0) * HEADS // heads_a_group
    p, n, q = tl.arange(0, P), tl.arange(0, N), tl.arange(0, Q)
    first = chunk.to(tl.int64) * Q
    inside = first + q < length
    C = tokens_of(C_ptr + row * C_row + group * C_group, first, C_token, length, Q, N)
    B = tokens_of(B_ptr + row * B_row + group * B_group, first, B_token, length, Q, N)
    scores = tl.dot(C, tl.trans(B), input_precision="ieee")
    visible = q[:, None] >= q[None, :]
    segment, before = q, 0
    if packed:
        segment = segments_of(segment_ptr, row, first, length, Q)
        before = segment_before(segment_ptr, row, first, length)
        visible = visible & (segment[:, None] == segment[None, :])
    scores = tl.where(visible, scores, 0.0)
    x_ptr += row * x_row
    y_ptr += (row * length + (first + q)[:, None]) * (heads * P) + p[None, :]
    for k in range(HEADS):
        head = tl.program_id(0) * HEADS + k
        index = row * heads + head
        decay = tl.load(decay_ptr + index * (chunks * Q) + first + q)
        step = tl.load(step_ptr + index * (chunks * Q) + first + q)
        # Above the diagonal the difference is positive and could overflow, so clamp it; the score is zero there.
        weights = scores * tl.exp2(tl.minimum(decay[:, None] - decay[None, :], 0.0)) * step[None, :]
        x = tokens_of(x_ptr + head * x_head, first, x_token, length, Q, P)
        state = tl.load(states_ptr + ((row * chunks + chunk) * heads + head) * (P * N) + p[None, :] * N + n[:, None])
        carried = tl.exp2(decay)
        if packed:
            carried = tl.where(segment == before, carried, 0.0)
        y = tl.dot(C, state, input_precision="ieee") * carried[:, None]
        y = tl.dot(weights.to(x.dtype), x, y, input_precision="ieee")
        y += tl.load(D_ptr + head) * x
        tl.store(y_ptr + head * P, y.to(y_ptr.dtype.element_ty), mask=inside[:, None])
