"""Gradients of parameters that several ranks hold copies of: added up in fp32 and summed over the ranks once a step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SummedGradients:
    """The gradients of one block's parameters, side by side in one fp32 buffer.

    The sum over the ranks begins when the last of them has arrived, and travels while the backward pass goes on with
    the block before. All ranks fill their buffers in the same order.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Gather nothing yet; ``group`` are the ranks with copies of the parameters."""
        self._group = group
        self._masters: list[nn.Parameter] = []
        self._arrived: dict[nn.Parameter, Tensor] = {}
        self._views: dict[nn.Parameter, Tensor] = {}
        self._buffer: Tensor | None = None
        self._work: dist.Work | None = None

    def include(self, master: nn.Parameter) -> None:
        """Expect the gradient of one more parameter."""
        self._masters.append(master)

    def arrive(self, master: nn.Parameter, gradient: Tensor, last: bool) -> None:
        """Take a parameter's gradient of one pass; ``last`` marks the step's final pass."""
        self._arrived[master] = gradient
        if len(self._arrived) == len(self._masters):
            self.end_pass(last)

    def end_pass(self, last: bool) -> None:
        """Add what arrived to the buffer, and begin the sum over the ranks after the last pass."""
        if self._work is not None:
            return
        first = self._buffer is None
        if first:
            sizes = [master.numel() for master in self._masters]
            self._buffer = self._masters[0].new_empty(sum(sizes), dtype=torch.float32, requires_grad=False)
            parts = self._buffer.split(sizes)
            self._views = {m: part.view_as(m) for m, part in zip(self._masters, parts, strict=True)}
            if len(self._arrived) < len(self._masters):
                self._buffer.zero_()
        if self._arrived:
            views = [self._views[master] for master in self._arrived]
            (torch._foreach_copy_ if first else torch._foreach_add_)(views, list(self._arrived.values()))
            self._arrived.clear()
        if last:
            assert self._buffer is not None
            self._work = dist.all_reduce(self._buffer, group=self._group, async_op=True)

    def wait(self) -> dict[nn.Parameter, Tensor]:
        """Return the sums by parameter; later work of the device's stream comes after them."""
        if self._work is not None:
            self._work.wait()
        return self._views

    def discard(self) -> None:
        """Forget the gradients; the step is over."""
        if self._work is not None:
            self._work.wait()
        self._arrived.clear()
        self._views, self._buffer, self._work = {}, None, None
