"""Document boundaries in a batch of packed rows.

Shape legend: B rows, S tokens of a row (or of a context parallel rank's chunk).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Self

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
        """Derive all boundaries from positions (int64, on the CPU to avoid device synchronization).

        Rows without tokens have no documents: the second half of a chunk of one token.
        """
        rows, length = positions_BS.shape
        starts_BS = positions_BS == 0
        if not length:
            return cls(positions_BS, starts_BS.int(), torch.zeros(1, dtype=torch.int32), 0, None)
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

    def padded(self, count: int) -> Self:
        """Return equal boundaries in a form that depends on ``count`` and the shape alone, for recorded passes.

        ``cu_seqlens`` gets ``count`` + 1 entries, at least as many as it has: empty documents follow the last. Nothing
        else is left to the host: the longest document counts as long as a row, and rows as broken by documents.
        """
        missing = count + 1 - len(self.cu_seqlens)
        assert missing >= 0, f"{len(self.cu_seqlens) - 1} documents do not fit {count}"
        return replace(
            self,
            cu_seqlens=torch.cat([self.cu_seqlens, self.cu_seqlens[-1:].expand(missing)]),
            max_seqlen=self.positions_BS.shape[1],
            tokens_before=None,
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return the boundaries with every tensor changed, those inside them too."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {
            name: change(value) if isinstance(value, Tensor) else value.map(change)
            for name, value in values.items()
            if isinstance(value, Tensor | Documents)
        }
        return replace(self, **changed)

    def nested(self) -> Iterator[Documents]:
        """Yield these boundaries and those inside them."""
        yield self
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), Documents):
                yield from value.nested()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Copy the tensors to ``device``."""
        return self.map(lambda tensor: send(tensor, device, non_blocking))
