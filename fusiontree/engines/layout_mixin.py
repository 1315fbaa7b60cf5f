"""What every engine says about its processes."""

from __future__ import annotations

import torch
from torch import Tensor

from fusiontree.parallel.layout import Layout


class LayoutMixin:
    """The part of the ``Engine`` protocol that the layout alone answers."""

    def __init__(self, layout: Layout) -> None:
        """Stand in ``layout``, this process's place."""
        self.layout = layout
        self.device: torch.device = layout.device

    @property
    def dp_rank(self) -> int:
        """Which part of every global batch this rank reads."""
        return self.layout.dp_rank

    @property
    def dp_size(self) -> int:
        """Number of parts of a global batch."""
        return self.layout.dp_size

    @property
    def rank(self) -> int:
        """This process among all."""
        return self.layout.place.rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.layout.place.world_size

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and prints."""
        return self.layout.is_main

    def gather_text(self, text: str) -> list[str]:
        """Return every rank's text, in order of rank."""
        return self.layout.gather_text(text)

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.layout.barrier()

    def sum_over_rows(self, values: Tensor) -> Tensor:
        """Sum ``values`` over the ranks that read different rows."""
        return self.layout.sum_over_rows(values)

    def sum_over_tokens(self, values: Tensor) -> Tensor:
        """Sum ``values`` over the ranks that hold different tokens."""
        return self.layout.sum_over_tokens(values)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum ``values`` over all ranks."""
        return self.layout.sum_over_ranks(values)
