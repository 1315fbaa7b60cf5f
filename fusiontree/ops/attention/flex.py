"""Attention by FlexAttention: compiled for the GPU, skips blocks outside window and document.

Shape legend: B rows, S queries, T keys, H query heads, K key/value heads, D channels of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import _disable_current_modes

from fusiontree.ops.attention.reference import AttentionInputs
from fusiontree.ops.attention.sdpa import sdpa
from fusiontree.ops.attention.split_causal import can_attend_in_parts, causal_suffix_attention

_SHAPES = 64
"""Shapes and windows that a process compiles; after torch's limit of 8 it would build masks of all pairs of tokens."""


@functools.cache
def _compiled(function: Callable) -> Any:
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _SHAPES)
    return torch.compile(function, dynamic=False)


# Masks for the positions of the latest batches, shared by layers with equal windows. A context parallel rank has three
# position tensors per batch: its chunk and the two half chunks of its global heads.
_masks: dict[int, tuple[Tensor, dict[tuple[int, int, int | None], Any]]] = {}
_KEPT_POSITIONS = 3


def _block_mask(positions_BS: Tensor, keys: int, window: int | None) -> Any:
    if id(positions_BS) not in _masks:
        while len(_masks) >= _KEPT_POSITIONS:
            del _masks[next(iter(_masks))]
        _masks[id(positions_BS)] = (positions_BS, {})  # a reference to the tensor, so that its id is not reused
    masks = _masks[id(positions_BS)][1]
    queries = positions_BS.shape[1]
    key = (queries, keys, window)
    if key not in masks:
        offset = keys - queries

        def visible(row: Tensor, head: Tensor, query: Tensor, index: Tensor) -> Tensor:
            distance = query + offset - index
            seen = (distance >= 0) & (distance <= positions_BS[row, query])
            return seen & (distance < window) if window is not None else seen

        masks[key] = _compiled(create_block_mask)(
            visible, positions_BS.shape[0], None, queries, keys, device=str(positions_BS.device)
        )
    return masks[key]


def attention_flex(inputs: AttentionInputs) -> Tensor:
    """Compute :func:`fusiontree.ops.attention.attention`."""
    q_BSHD, k_BTKD, v_BTKD, window, documents, scale = inputs
    if inputs.causal_rows:
        # One causal triangle per row: cuDNN's kernel is the fastest in torch.
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
            return sdpa(q_BSHD, k_BTKD, v_BTKD, None, scale)
    q_BHSD, k_BKTD, v_BKTD = q_BSHD.transpose(1, 2), k_BTKD.transpose(1, 2), v_BTKD.transpose(1, 2)
    before, keys = inputs.before, k_BTKD.shape[1]
    if window is None and (documents is None or documents.tokens_before == before) and can_attend_in_parts(q_BHSD):
        return causal_suffix_attention(q_BHSD, k_BKTD, v_BKTD, scale).transpose(1, 2)
    if documents is None:
        positions_BS = torch.arange(before, keys, device=q_BSHD.device).expand(q_BSHD.shape[0], -1)
    else:
        positions_BS = documents.positions_BS
    with _disable_current_modes():  # FlexAttention cannot be compiled under a TorchDispatchMode
        out_BHSD = _compiled(flex_attention)(
            q_BHSD,
            k_BKTD,
            v_BKTD,
            block_mask=_block_mask(positions_BS, keys, window),
            scale=scale,
            enable_gqa=q_BSHD.shape[2] != k_BTKD.shape[2],
        )
    return out_BHSD.transpose(1, 2)
