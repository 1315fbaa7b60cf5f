"""Operations of one decoding step in plain PyTorch. Shape legend: B rows, K inputs, N outputs of a product."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusiontree.ops.gate.reference import GivenBranches, mix
from fusiontree.ops.norm.reference import rms_norm

Activation = Literal["none", "gelu", "tanh", "swiglu"]


class Weight(NamedTuple):
    """The matrix of a product: ``values * scale``."""

    values_NK: Tensor
    """In the dtype of the activations, or int8 or fp8 with a scale."""
    scale_N: Tensor | None = None
    """Factor of each output, fp32."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix in ``dtype``."""
        if self.scale_N is None:
            return self.values_NK
        return (self.values_NK.to(torch.float32) * self.scale_N[:, None]).to(dtype)


class Norm(NamedTuple):
    """An RMS norm of a product's input."""

    weight_K: Tensor
    eps: float


class Shift(NamedTuple):
    """A vector that is added to the input, after its norm, for the first ``outputs`` outputs only."""

    values_BK: Tensor
    outputs: int


class Mix(NamedTuple):
    """Mix of branches; the product computes the gate's logits."""

    branches_BC: Tensor
    given: GivenBranches


class Second(NamedTuple):
    """Another product that is added to the first."""

    x_BK: Tensor
    weight: Weight
    activation: Activation = "none"


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
) -> Tensor:
    """Compute :func:`fusiontree.ops.step.product`."""
    x = x_BK if norm is None else rms_norm(x_BK, norm.weight_K, norm.eps)
    result = _times(activated(x, activation), weight)
    if shift is not None and shift.outputs:
        first = Weight(
            weight.values_NK[: shift.outputs], None if weight.scale_N is None else weight.scale_N[: shift.outputs]
        )
        shifted = _times(x + shift.values_BK, first)
        result = torch.cat([shifted, result[:, shift.outputs :]], dim=1)
    if second is not None:
        result = result + _times(activated(second.x_BK, second.activation), second.weight)
    if add_BN is not None:
        result = result + add_BN
    if mixed is not None:
        result = mix(result, mixed.branches_BC, mixed.given)
    if out_BN is None:
        return result
    return out_BN.copy_(result)


def activated(x_BK: Tensor, activation: Activation) -> Tensor:
    """Return the activation of ``x``; for swiglu, ``x`` has the gate's channels first, then as many others."""
    if activation == "gelu":
        return F.gelu(x_BK)
    if activation == "tanh":
        return torch.tanh(x_BK)
    if activation == "swiglu":
        gate, up = x_BK.chunk(2, dim=-1)
        return F.silu(gate) * up
    return x_BK


def _times(x_BK: Tensor, weight: Weight) -> Tensor:
    return F.linear(x_BK, weight.dense(x_BK.dtype))
