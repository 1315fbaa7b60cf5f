"""The reference convolution, fused into one kernel by torch.compile (GPU)."""

from __future__ import annotations

from torch import Tensor

from fusiontree.ops.conv.reference import shifted_products
from fusiontree.ops.documents import Documents
from fusiontree.ops.elementwise import compiled


def causal_conv1d_compiled(
    x_BSC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    *,
    documents: Documents | None = None,
    initial_BKC: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """Compute :func:`fusiontree.ops.conv.causal_conv1d`."""
    masked = documents is not None and (not documents.whole_rows or initial_BKC is not None)
    positions_BS = documents.positions_BS if masked and documents is not None else None
    return compiled(shifted_products)(x_BSC, weight_CK, bias_C, positions_BS, initial_BKC, activation)
