"""Causal depthwise convolution with SiLU."""

from __future__ import annotations

from torch import Tensor

from fusiontree.ops.conv.reference import one_token, shifted_products
from fusiontree.ops.documents import Documents
from fusiontree.ops.elementwise import fused, with_kernel

CONV = with_kernel("conv", shifted_products, "fusiontree.ops.conv.triton:shifted_products_triton", setting="conv")


def causal_conv1d(
    x_BSC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    *,
    documents: Documents | None = None,
    initial_BKC: Tensor | None = None,
    activation: str | None = "silu",
    backend: str = "auto",
) -> Tensor:
    """Convolve each channel with K taps over the token and the K-1 tokens before it, within its document.

    y_t = activation(bias + sum_k weight[K-1-k] x_{t-k}); inputs before the document's start count as zero.

    Args:
        x_BSC: inputs; B rows, S tokens, C channels.
        weight_CK: taps, the last one for the token itself.
        bias_C: bias or None.
        documents: document boundaries; None means each row is one document (or continues ``initial_BKC``).
        initial_BKC: left context, the K-1 inputs before the first token [B, K-1, C]; None means zeros.
        activation: "silu" or None.
        backend: a name of :data:`CONV` or "auto".

    Returns:
        Outputs [B, S, C] in x's dtype.
    """
    convolve = CONV.choose(backend, x_BSC.device.type)
    if x_BSC.shape[1] == 1 and documents is None and initial_BKC is not None:  # a decoding step
        step = fused(one_token, "reference" if backend == "reference" else "auto", x_BSC.device.type)
        return step(x_BSC, weight_CK, bias_C, initial_BKC, activation)
    # Zero padding already ends the taps at a row's start; only document boundaries inside a row need masks.
    masked = documents is not None and (not documents.whole_rows or initial_BKC is not None)
    positions_BS = documents.positions_BS if masked and documents is not None else None
    return convolve(x_BSC, weight_CK, bias_C, positions_BS, initial_BKC, activation)
