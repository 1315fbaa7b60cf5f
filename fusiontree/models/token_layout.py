"""Token layout of a forward: documents, positions, padding, and cached tokens before the batch.

Shape legend: B rows, S tokens, C channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusiontree.models.cache import DecodeCache
from fusiontree.models.mixers.base import MixerInputs
from fusiontree.models.mixers.cache import NewTokens
from fusiontree.ops.documents import Documents


class BlockInputs(NamedTuple):
    """Inputs of every block besides the hidden states."""

    mixer: MixerInputs
    srte_BSC: Tensor | None
    """Shared time encoding in the hidden dtype; mixers with ``adds_time_encoding`` receive their input plus this."""


class TokenLayout(NamedTuple):
    """Positions, documents and padding of the tokens of a forward."""

    documents: Documents | None
    positions_BS: Tensor
    """Position of each token in its document; B may be 1."""
    end: int
    """One more than the greatest position that the host knows."""
    padding_mask_BS: Tensor | None
    """True on real tokens; None if there are no pads."""
    counts: list[int]
    """Real tokens of each row."""
    new: NewTokens | None


def lay_out_tokens(
    shape: torch.Size,
    device: torch.device,
    documents: Documents | None,
    padding_mask_BS: Tensor | None,
    cache: DecodeCache | None,
) -> TokenLayout:
    """Return the token layout of a batch of ``shape`` [B, S].

    Raises:
        TypeError: the padding mask is not boolean.
        ValueError: arguments contradict each other, or the real tokens of a row are not contiguous.
    """
    rows, length = shape
    if documents is not None:
        if padding_mask_BS is not None or cache is not None:
            other = "padding_mask_BS" if padding_mask_BS is not None else "a cache"
            raise ValueError(f"documents are for packed rows and {other} is for single texts; give one of them")
        if documents.positions_BS.shape != shape:
            raise ValueError(f"documents are of {tuple(documents.positions_BS.shape)} tokens, the input {tuple(shape)}")
    if cache is not None and cache.rows != rows:
        raise ValueError(f"the cache holds {cache.rows} rows and the input {rows}; see DecodeCache.select")
    counts = [length] * rows
    first = [0] * rows
    if padding_mask_BS is not None:
        check_padding_mask(padding_mask_BS, shape)
        documents, first, counts = documents_of_padding(padding_mask_BS)
        if counts == [length] * rows:
            documents = padding_mask_BS = None
    if cache is not None and padding_mask_BS is not None:
        if not cache.is_empty:
            raise ValueError("pads are allowed in the forward that fills a cache, not in those that continue it")
        if any(start + count != length for start, count in zip(first, counts, strict=True)):
            raise ValueError(
                "a cache is filled from rows padded on the left, so that every text ends in the last column"
            )
    continued = cache is not None and not cache.is_empty
    if cache is not None and continued:
        cache.check_room(length)
        positions_BS = cache.next_positions_BS(length)  # no document starts here: all continue what the cache holds
    elif documents is None:
        positions_BS = torch.arange(length, device=device)[None]
    else:
        positions_BS = documents.positions_BS
    if cache is not None:
        end = max(cache.lengths) + max(counts)
    elif documents is None:
        end = length
    elif positions_BS.is_cuda:
        end = documents.max_seqlen  # the true positions of a chunk that continues a document are only on the GPU
    else:
        end = int(positions_BS.max()) + 1
    new = None
    if cache is not None:
        seen_BS = positions_BS.expand(rows, length)
        if padding_mask_BS is not None:
            seen_BS = seen_BS.masked_fill(~padding_mask_BS, -1)
        whole = padding_mask_BS is None and all(length == cache.columns for length in cache.lengths)
        new = NewTokens(seen_BS, end, continued, cache.column_1, whole, {})
    return TokenLayout(documents, positions_BS, end, padding_mask_BS, counts, new)


def check_padding_mask(padding_mask_BS: Tensor, shape: torch.Size) -> None:
    """Raise TypeError if a padding mask is not boolean, ValueError if its shape is not that of the tokens."""
    if padding_mask_BS.dtype is not torch.bool:
        raise TypeError(
            f"padding_mask_BS is {padding_mask_BS.dtype}; it must be torch.bool with True on real tokens: pass "
            f"mask.bool() if 1 marks a real token"
        )
    if padding_mask_BS.shape != shape:
        raise ValueError(f"padding_mask_BS has shape {tuple(padding_mask_BS.shape)} and the tokens {tuple(shape)}")


def documents_of_padding(padding_mask_BS: Tensor) -> tuple[Documents, list[int], list[int]]:
    """Turn a padding mask into document boundaries: the text of a row is one document, pads form separate documents.

    Args:
        padding_mask_BS: bool, True on real tokens.

    Returns:
        The boundaries on the mask's device; the index of each row's first real token; each row's number of real tokens.

    Raises:
        ValueError: a row has no real token, or has pads between real tokens.
    """
    mask_BS = padding_mask_BS.cpu()
    index_S = torch.arange(mask_BS.shape[1])
    counts_B = mask_BS.sum(1)
    first_B1 = mask_BS.int().argmax(1, keepdim=True)
    end_B1 = first_B1 + counts_B[:, None]
    run_BS = (index_S >= first_B1) & (index_S < end_B1)
    for row in range(mask_BS.shape[0]):
        if not counts_B[row]:
            raise ValueError(f"row {row} of padding_mask_BS has no real token; leave such rows out of the batch")
        if not torch.equal(mask_BS[row], run_BS[row]):
            raise ValueError(
                f"row {row} of padding_mask_BS has pads between real tokens; the real tokens of a row must be one run"
            )
    start_BS = torch.where(index_S < first_B1, 0, torch.where(run_BS, first_B1, end_B1))
    documents = Documents.from_positions(index_S - start_BS)
    return documents.to(padding_mask_BS.device), first_B1[:, 0].tolist(), counts_B.tolist()
