"""Whose gradient was not finite: looked at on each rank before any reduction spreads it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class GradientWatch:
    """Watches the gradient that arrives at the embedding's output, once a micro batch.

    After the reduction a NaN of one rank is a NaN of all. The embedding's output is where a rank's own backward pass
    ends, so nearly every NaN made on the way is still in it. Nothing is waited for until somebody asks.
    """

    def __init__(self, embedding: nn.Module) -> None:
        """Watch ``embedding``, the module that turns token ids into vectors."""
        self._now: list[Tensor] = []
        self._last: list[Tensor] = []
        embedding.register_forward_hook(self._forward)

    def _forward(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self._note)

    def _note(self, gradient: Tensor) -> None:
        # A sum is not finite when an element is not, and needs no memory of the gradient's size.
        self._now.append(gradient.sum(dtype=torch.float32))

    def end_step(self) -> None:
        """Note that the step's last backward pass is over."""
        self._last, self._now = self._now, []

    def finite(self) -> list[bool]:
        """Return for each micro batch of the step before whether its gradient was finite on this rank."""
        return [bool(total.isfinite()) for total in self._last]
