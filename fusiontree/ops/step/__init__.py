"""Operations of one decoding step (one new token per row), fused so that a layer needs few launches.

Shape legend: B rows, K inputs, N outputs of a product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusiontree.ops.dispatch import triton_unavailable
from fusiontree.ops.step import reference
from fusiontree.ops.step.reference import Activation, Mix, Norm, Second, Shift, Weight

__all__ = ["Activation", "Mix", "Norm", "Second", "Shift", "Weight", "has_kernels", "product"]


def has_kernels(x: Tensor, backend: str = "auto") -> bool:
    """Return whether Triton kernels compute the step of ``x``; ``backend`` is ``kernels.elementwise``."""
    return backend == "auto" and x.dtype != torch.float64 and triton_unavailable(x.device) is None


def product(
    x_BK: Tensor,
    weight: Weight,
    *,
    norm: Norm | None = None,
    shift: Shift | None = None,
    activation: Activation = "none",
    second: Second | None = None,
    add_BN: Tensor | None = None,
    mixed: Mix | None = None,
    out_BN: Tensor | None = None,
    follows: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Return ``mix(activation(norm(x) + shift) W^T + second + add)`` of a few rows.

    Args:
        x_BK: inputs; twice K channels for swiglu.
        weight: the matrix; sums are fp32.
        norm: RMS norm of the input. Excludes an activation.
        shift: vector added to the normed input for the first outputs.
        activation: of the input.
        second: another product to add.
        add_BN: values to add.
        mixed: the result is the gate's logits; return the mix of these branches instead.
        out_BN: where to write the result; channels must be contiguous.
        follows: the launch ahead in the stream is a kernel, and no other stream's work was joined since: the product
            may load weights before that kernel has ended.
        backend: ``kernels.elementwise``.

    Returns:
        ``[B, N]`` in the dtype of ``x``.
    """
    arguments: dict[str, Any] = {
        "norm": norm, "shift": shift, "activation": activation, "second": second, "add_BN": add_BN, "mixed": mixed,
        "out_BN": out_BN,
    }  # fmt: skip
    if has_kernels(x_BK, backend):
        from fusiontree.ops.step.product_triton import product as kernel

        return kernel(x_BK, weight, follows=follows, **arguments)
    return reference.product(x_BK, weight, **arguments)
