"""Step of AdamW in plain PyTorch, without waiting for the device (Loshchilov and Hutter 2019, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Gradients = Sequence[Tensor | None]
"""Of each tensor, of any floating dtype; None counts as zeros."""


class Parts(NamedTuple):
    """A tensor, its states and its copy: contiguous, of equal numbers of elements, updated in place."""

    values: Tensor
    """fp32."""
    mean: Tensor
    """Decaying mean of the gradient."""
    square: Tensor
    """Decaying mean of the gradient's square."""
    step: Tensor
    """Number of updates so far, fp32 scalar."""
    decay: float
    """Weight decay per step and unit of learning rate."""
    copy: Tensor | None = None
    """Receives the updated values in its own dtype."""


class Constants(NamedTuple):
    """Settings of AdamW."""

    beta1: float
    beta2: float
    eps: float


class Update(Protocol):
    """The update of a fixed list of tensors."""

    def prepare(self, gradients: Gradients) -> None:
        """Let an update with gradients at these addresses be recorded in a CUDA graph."""
        ...

    def __call__(self, gradients: Gradients, rate: Tensor, divisor: Tensor, norm: Tensor) -> None:
        """Queue one update; the host does not wait.

        Args:
            gradients: of each tensor, in order.
            rate: learning rate, a scalar on the device.
            divisor: the gradients are divided by this scalar on the device.
            norm: scalar on the device; where it is not finite, nothing is written.

        Raises:
            RuntimeError: a CUDA graph is being recorded and :meth:`prepare` did not see these gradients.
        """
        ...


class ReferenceUpdate:
    """An :class:`Update` of one tensor after another."""

    def __init__(self, parts: Sequence[Parts], constants: Constants) -> None:
        """Keep the tensors."""
        self.parts, self.constants = list(parts), constants

    def prepare(self, gradients: Gradients) -> None:
        """Do nothing: PyTorch's operations are recorded as they are."""

    @torch.no_grad()
    def __call__(self, gradients: Gradients, rate: Tensor, divisor: Tensor, norm: Tensor) -> None:
        """Do :meth:`Update.__call__`."""
        finite = norm.isfinite()
        beta1, beta2, eps = self.constants
        for its, given in zip(self.parts, gradients, strict=True):
            its.step.add_(finite.to(its.step.dtype))
            gradient = torch.zeros_like(its.values) if given is None else given.to(its.values.dtype)
            gradient = gradient.view_as(its.values) / divisor.to(its.values.dtype)
            mean = its.mean.to(gradient.dtype).view_as(gradient) * beta1 + gradient * (1 - beta1)
            square = its.square.to(gradient.dtype).view_as(gradient) * beta2 + gradient.square() * (1 - beta2)
            step = its.step.double()
            unbiased_mean, unbiased_square = mean / (1 - beta1**step), square / (1 - beta2**step)
            decayed = its.values - its.values * (rate * its.decay)
            values = decayed - rate * unbiased_mean / (unbiased_square.sqrt() + eps)
            pairs = ((its.values, values), (its.mean, mean), (its.square, square), (its.copy, values))
            for old, new in pairs:
                if old is not None:
                    old.copy_(torch.where(finite, new.view_as(old).to(old.dtype), old))
