"""The arguments of a scan as one record, from :func:`fusiontree.ops.ssd.ssd_scan` to every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fusiontree.ops.documents import Documents

StateExchange = Callable[[Tensor, Tensor], Tensor]


class ScanInputs(NamedTuple):
    """Arguments of :func:`fusiontree.ops.ssd.ssd_scan`, which describes them, in the order of the formulas."""

    x_BSHP: Tensor
    dt_BSH: Tensor
    A_H: Tensor
    B_BSGN: Tensor
    C_BSGN: Tensor
    D_H: Tensor
    chunk_size: int
    documents: Documents | None = None
    initial_state_BHPN: Tensor | None = None
    state_exchange: StateExchange | None = None

    @property
    def whole_rows(self) -> bool:
        """True if each row is exactly one document from its start, so that no state enters it."""
        return self.documents is not None and self.documents.whole_rows

    @property
    def segments_BS(self) -> Tensor | None:
        """Number of document starts up to each token, int32; segment 0 continues the initial state. None: no masks."""
        return None if self.documents is None else self.documents.inner_segments_BS

    def for_kernels(self) -> ScanInputs:
        """Return the inputs with steps, weights per head and state in fp32, and without a state that no row continues.

        Must run outside an autograd function, so that gradients are cast back.
        """
        initial = None if self.whole_rows or self.initial_state_BHPN is None else self.initial_state_BHPN.float()
        return self._replace(
            dt_BSH=self.dt_BSH.float(), A_H=self.A_H.float(), D_H=self.D_H.float(), initial_state_BHPN=initial
        )
