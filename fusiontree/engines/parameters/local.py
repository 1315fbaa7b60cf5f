"""Parameters that no other rank shares: nothing to gather, nothing to reduce.

All of a job with one process, and the heads' parameters where tensor parallelism takes every rank. ``fully_shard`` over
one rank would copy every parameter three times on its way from fp32 to the 16-bit type, twice a step, and every
gradient twice on its way back. Here the model holds 16-bit copies beside the fp32 parameters that the optimizer works
on. Gradients of one micro batch stay as the backward pass made them, and those of several are added up in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class LocalParameters:
    """fp32 parameters and, in mixed precision, the copies of them that the model computes with."""

    def __init__(self, model: nn.Module) -> None:
        """Start with none of ``model``'s."""
        self._model = model
        self.masters: dict[nn.Parameter, nn.Parameter] = {}
        """The optimizer's parameter for each that the model computes with; the same one where that is fp32."""
        self.gradients: dict[nn.Parameter, Tensor] = {}
        """What the backward passes of this step gave, by the optimizer's parameter."""
        self._in_step = False

    def add(self, parameters: dict[str, nn.Parameter], dtype: torch.dtype) -> None:
        """Take parameters by name, and let the model compute with them in ``dtype``."""
        copies: dict[nn.Parameter, nn.Parameter] = {}
        for parameter in dict.fromkeys(parameters.values()):  # a tied one stays one
            copy = parameter if parameter.dtype == dtype else nn.Parameter(parameter.detach().to(dtype))
            copies[parameter] = copy
            self.masters[copy] = parameter
            copy.register_post_accumulate_grad_hook(_take(None if copy is parameter else parameter, self.gradients))
        put_in_place(self._model, {name: copies[parameter] for name, parameter in parameters.items()})

    def begin(self, training: bool) -> None:
        """Copy the parameters, whoever changed them, to what the model computes with; once a step of training."""
        if self._in_step:
            return
        pairs = [(copy.detach(), master.detach()) for copy, master in self.masters.items() if copy is not master]
        if pairs:
            copies, masters = zip(*pairs, strict=True)
            torch._foreach_copy_(list(copies), list(masters))
        self._in_step = training

    def hand_over(self) -> None:
        """Give the gradients to the optimizer's parameters, in fp32."""
        while self.gradients:
            master, gradient = self.gradients.popitem()
            master.grad = gradient.float()

    def discard(self) -> None:
        """Clear the gradients; the step is over."""
        self.gradients.clear()
        self._in_step = False


def put_in_place(model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """Let ``model`` compute with ``parameters`` in the place of those that bear their names."""
    for name, parameter in parameters.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, parameter)


def _take(master: nn.Parameter | None, gradients: dict[nn.Parameter, Tensor]) -> Callable[[nn.Parameter], None]:
    """Return what to do with a finished gradient: keep the first, add others in fp32.

    The hook must hold neither its own parameter (``master`` is None where that is the optimizer's too) nor what holds
    it: Python does not see that circle, and would never free it.
    """

    def take(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        owner = parameter if master is None else master
        before = gradients.get(owner)
        gradients[owner] = parameter.grad if before is None else before.float().add_(parameter.grad)
        parameter.grad = None

    return take
