"""Causal attention within documents, over a window or over all previous tokens."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from fusiontree.ops.attention.decode import decode_attention, key_bias, roomy
from fusiontree.ops.attention.flash import PACKAGES, load
from fusiontree.ops.attention.reference import AttentionInputs, attention_reference, masked_attention
from fusiontree.ops.attention.sdpa import attention_sdpa
from fusiontree.ops.dispatch import Backend, Operation, anywhere, loader
from fusiontree.ops.documents import Documents
from fusiontree.ops.elementwise import needs_gpu
from fusiontree.utils.errors import UserError

log = logging.getLogger(__name__)

__all__ = ["ATTENTION", "AttentionInputs", "attention", "cached_attention", "decode_attention", "key_bias", "roomy"]


def _package(name: str) -> Backend:
    return Backend(name, functools.partial(load, name), PACKAGES[name].unavailable)


ATTENTION = Operation(
    "attention",
    [
        _package("flash4"),
        Backend("flex", loader("fusiontree.ops.attention.flex:attention_flex"), needs_gpu),
        _package("varlen"),
        Backend("sdpa", lambda: attention_sdpa, anywhere),
        Backend("reference", lambda: attention_reference, anywhere),
    ],
)


def attention(
    q_BSHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    *,
    window: int | None = None,
    documents: Documents | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute causal attention: each token sees itself and earlier tokens of its document and window.

    The queries are the last S of the T keys. Query i at position p of its document sees key j exactly when
    0 <= (i + T - S) - j <= min(window - 1, p).

    Args:
        q_BSHD: queries; B rows, S tokens, H heads of D channels.
        k_BTKD: keys, T >= S tokens, K key/value heads; query head h reads key/value head h // (H / K).
        v_BTKD: values.
        window: number of tokens that a query sees, including its own token; None means its full document.
        documents: boundaries of the queries' tokens; None means each row is one document that begins with the keys.
        scale: factor on the scores; None means 1 / sqrt(D).
        backend: a name of :data:`ATTENTION`, or "auto" for the first backend that runs here and supports the sizes.

    Returns:
        Outputs [B, S, H, D].

    Raises:
        UserError: the named backend cannot run here, or has no kernel for these heads.
        ValueError: there are fewer keys than queries.
    """
    if k_BTKD.shape[1] < q_BSHD.shape[1]:
        raise ValueError(f"{k_BTKD.shape[1]} keys are fewer than {q_BSHD.shape[1]} queries")
    name = _fitting(backend, q_BSHD.device.type, q_BSHD.dtype, q_BSHD.shape[-1], q_BSHD.shape[1] % 128 == 0)
    attend = ATTENTION.choose(name, q_BSHD.device.type)
    return attend(AttentionInputs(q_BSHD, k_BTKD, v_BTKD, window, documents, scale))


@functools.cache
def _fitting(backend: str, device_type: str, dtype: torch.dtype, width: int, whole_tiles: bool) -> str:
    """Return the backend for heads of ``width`` channels in ``dtype``; logs once if "auto" passes a backend over.

    ``whole_tiles``: the number of queries is a multiple of 128.
    """
    if backend in PACKAGES:
        why = PACKAGES[backend].unfit(dtype, width)
        if why is not None:
            raise UserError(f"kernels.attention={backend} cannot compute this: {why}; kernels.attention=auto can")
    if backend != "auto":
        return backend
    device, passed_over = torch.device(device_type), False
    for name, candidate in ATTENTION.backends.items():
        if candidate.unavailable(device) is not None:
            continue
        if name == "flex" and (width < 16 or not whole_tiles):
            # Prompts have any length, and FlexAttention compiles each length anew.
            why = f"heads have {width} channels, not 16 or more" if width < 16 else "row length no multiple of 128"
            log.info("attention on %s: sdpa, as backend flex is not used: %s", device_type, why)
            return "sdpa"
        why = PACKAGES[name].unfit(dtype, width) if name in PACKAGES else None
        if why is None:
            return name if passed_over else "auto"
        log.info("attention on %s: backend %s is not used; %s", device_type, name, why)
        passed_over = True
    raise AssertionError("the reference runs anywhere")


def cached_attention(
    q_BSHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    *,
    key_positions_BT: Tensor,
    query_positions_BS: Tensor,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute attention of new tokens to cached keys in any order.

    Args:
        q_BSHD: queries.
        k_BTKD: keys in the order of the cache's slots, including the keys of the new tokens.
        v_BTKD: values.
        key_positions_BT: each slot's position in its row's text; -1 marks an empty slot.
        query_positions_BS: the queries' positions.
        window: number of tokens that a query sees, including its own token; None means all.
        scale: factor on the scores; None means 1 / sqrt(D).

    Returns:
        Outputs [B, S, H, D]; zero for a query that sees no key (padding).
    """
    distance_BST = query_positions_BS.unsqueeze(-1) - key_positions_BT.unsqueeze(1)
    visible_BST = (distance_BST >= 0) & (key_positions_BT >= 0).unsqueeze(1)
    if window is not None:
        visible_BST = visible_BST & (distance_BST < window)
    seen_BS = visible_BST.any(-1)
    # For a query without visible keys, softmax would divide zero by zero: show it all keys and discard the result.
    out_BSHD = masked_attention(q_BSHD, k_BTKD, v_BTKD, visible_BST | ~seen_BS.unsqueeze(-1), scale)
    return torch.where(seen_BS[..., None, None], out_BSHD, torch.zeros_like(out_BSHD))
