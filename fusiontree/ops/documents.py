"""Document boundaries in a batch of packed rows.

Shape legend: B rows, S tokens of a row (or of a context parallel rank's chunk).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusiontree.utils.device import send


@dataclass(frozen=True)
class Documents:
    """Document boundaries of a batch ``[B, S]``; attention, convolution, state and positions restart at each boundary.

    All fields follow from ``positions_BS``: a token starts a document exactly if its position is 0, and a token at
    position p sees at most the p tokens before it, on whatever rank they are. A row that begins inside a document
    starts at position 0. A context parallel chunk does not: its first token keeps its true position.
    """

    positions_BS: Tensor
    """Position of each token inside its document, int64."""
    segments_BS: Tensor
    """Running count of document starts along the row, int32; 0 where the chunk continues an earlier document."""
    cu_seqlens: Tensor
    """Starts of documents and of rows among the B*S flattened tokens, followed by B*S; int32, [documents + 1]."""
    max_seqlen: int
    """Longest run between two entries of ``cu_seqlens``, in tokens."""
    tokens_before: int | None
    """Number of tokens of the document before the row, if that is equal for all rows and no document starts after a
    row's first token (boundaries then need no masking); otherwise None."""

    @property
    def inner_segments_BS(self) -> Tensor | None:
        """``segments_BS``, or None if no document starts after a row's first token, so that no comparison is needed."""
        return None if self.tokens_before is not None else self.segments_BS

    @property
    def whole_rows(self) -> bool:
        """True if each row is exactly one document, from the document's start."""
        return self.tokens_before == 0

    @classmethod
    def from_positions(cls, positions_BS: Tensor) -> Documents:
        """Derive all boundaries from positions (int64, on the CPU to avoid device synchronization)."""
        rows, length = positions_BS.shape
        starts_BS = positions_BS == 0
        breaks_BS = starts_BS.clone()
        breaks_BS[:, 0] = True
        bounds = torch.cat([breaks_BS.flatten().nonzero().flatten(), torch.tensor([rows * length])])
        first = int(positions_BS[0, 0])
        unbroken = not bool(starts_BS[:, 1:].any()) and bool((positions_BS[:, 0] == first).all())
        return cls(
            positions_BS=positions_BS,
            segments_BS=starts_BS.cumsum(dim=1, dtype=torch.int32),
            cu_seqlens=bounds.to(torch.int32),
            max_seqlen=int(bounds.diff().max()),
            tokens_before=first if unbroken else None,
        )

    @classmethod
    def whole(cls, rows: int, length: int, device: torch.device | str = "cpu") -> Documents:
        """Return boundaries for rows of one document of ``length`` tokens each."""
        return cls.from_positions(torch.arange(length).expand(rows, length).contiguous()).to(device)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Documents:
        """Copy the tensors to ``device``."""
        return Documents(
            send(self.positions_BS, device, non_blocking),
            send(self.segments_BS, device, non_blocking),
            send(self.cu_seqlens, device, non_blocking),
            self.max_seqlen,
            self.tokens_before,
        )
