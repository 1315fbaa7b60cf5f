"""Parameters that lie whole on the rank: nothing to gather.

All of a job with one process or with engine ``ddp``, and the heads' parameters where tensor parallelism takes every
rank. ``fully_shard`` over one rank would copy every parameter three times on its way from fp32 to the 16-bit type,
twice a step, and every gradient twice on its way back. Here the model holds 16-bit copies beside the fp32 parameters
that the optimizer works on. Where no other rank has a copy, gradients of one micro batch stay as the backward pass made
them, and those of several are added up in fp32; otherwise they go to the block's :class:`SummedGradients`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fusiontree.engines.summed import SummedGradients


class OwnParameters:
    """fp32 parameters and, in mixed precision, the copies of them that the model computes with."""

    def __init__(self) -> None:
        """Start with none."""
        self.masters: dict[nn.Parameter, nn.Parameter] = {}
        """The optimizer's parameter for each that the model computes with; the same one where that is fp32."""
        self.gradients: dict[nn.Parameter, Tensor] = {}
        """What the backward passes of this step gave, by the optimizer's parameter."""
        self.last_pass = True
        """Whether the step's final backward pass is under way."""
        self._sums: list[SummedGradients] = []
        self._in_step = False

    def add(self, modules: Iterable[nn.Module], dtype: torch.dtype, sums: SummedGradients | None = None) -> None:
        """Take the modules' parameters that nobody took yet, to be computed with in ``dtype``.

        ``sums`` is where their gradients meet those of other ranks' copies; None where there are none.
        """
        copies: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter stays one parameter
        for owner in modules:
            for module in owner.modules():
                for leaf, parameter in list(module.named_parameters(recurse=False)):
                    if parameter in self.masters or isinstance(parameter, DTensor):
                        continue
                    if parameter not in copies:
                        copies[parameter] = parameter
                        if parameter.dtype != dtype:
                            copies[parameter] = nn.Parameter(parameter.detach().to(dtype))
                    setattr(module, leaf, copies[parameter])
        for master, copy in copies.items():
            self.masters[copy] = master
            copy.register_post_accumulate_grad_hook(self._take(master, sums))
            if sums is not None:
                sums.include(master)
        if sums is not None and sums not in self._sums:
            self._sums.append(sums)

    def _take(self, master: nn.Parameter, sums: SummedGradients | None) -> Callable[[Tensor], None]:
        """Return what to do with a finished gradient: keep the first, add others in fp32."""

        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if sums is not None:
                sums.arrive(master, parameter.grad, self.last_pass)
                parameter.grad = None
                return
            before = self.gradients.get(master)
            self.gradients[master] = parameter.grad if before is None else before.float().add_(parameter.grad)
            parameter.grad = None

        return take

    def begin(self, training: bool) -> None:
        """Copy the parameters, whoever changed them, to what the model computes with; once a step of training."""
        if self._in_step:
            return
        pairs = [(copy.detach(), master.detach()) for copy, master in self.masters.items() if copy is not master]
        if pairs:
            copies, masters = zip(*pairs, strict=True)
            torch._foreach_copy_(list(copies), list(masters))
        self._in_step = training

    def end_pass(self) -> None:
        """A backward pass is over: gradients that waited for one that does not come go on."""
        for sums in self._sums:
            sums.end_pass(self.last_pass)

    def await_sums(self) -> None:
        """Put what the ranks' gradients add up to among the gradients."""
        for sums in self._sums:
            self.gradients |= sums.wait()

    def hand_over(self) -> None:
        """Give the gradients to the optimizer's parameters, in fp32."""
        while self.gradients:
            master, gradient = self.gradients.popitem()
            master.grad = gradient.float()

    def discard(self) -> None:
        """Clear the gradients; the step is over."""
        self.gradients.clear()
        for sums in self._sums:
            sums.discard()
        self._in_step = False
