"""The ``fsdp2`` and ``ddp`` engines of a job with one process: nothing to gather, nothing to reduce.

``fully_shard`` over one rank would copy every parameter three times on its way from fp32 to the 16-bit type, twice a
step, and every gradient twice on its way back. Here the model holds 16-bit copies beside the fp32 parameters that the
optimizer works on. Gradients of one micro batch stay as the backward pass made them; those of several are added up in
fp32, as ``fully_shard`` does it. The step is queued whole before anybody waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fusiontree.engines.base import StepInputs, StepOutputs, StepResult
from fusiontree.engines.fsdp2 import FSDP2Engine
from fusiontree.parallel.units import DistributedModel, Unit, units_inside_out


class OneRankEngine(FSDP2Engine):
    """Trains on one device: fp32 parameters and, in mixed precision, copies of them that the model computes with."""

    _computed: dict[str, nn.Parameter]
    """The model's parameters; where one is fp32 it is the optimizer's own."""
    _gradients: dict[str, Tensor]
    _in_step = False

    def _distribute(
        self, model: DistributedModel, materialize: Callable[[Unit], None], compute_dtype: torch.dtype
    ) -> dict[str, nn.Parameter]:
        masters: dict[nn.Parameter, nn.Parameter] = {}  # by what the model computes with
        for units in units_inside_out(model):
            materialize(units[-1])
            kept = {p for unit in units if unit.keep_fp32 for m in unit.modules for p in m.parameters()}
            copies: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter stays one parameter
            for owner in units[-1].modules:
                for module in owner.modules():
                    for leaf, parameter in list(module.named_parameters(recurse=False)):
                        if parameter in masters:
                            continue
                        if parameter not in copies:
                            copies[parameter] = parameter
                            if parameter not in kept and compute_dtype != torch.float32:
                                copies[parameter] = nn.Parameter(parameter.detach().to(compute_dtype))
                        setattr(module, leaf, copies[parameter])
            masters.update({copy: master for master, copy in copies.items()})
        self._computed = dict(self.module.named_parameters())
        self._gradients = {}
        for name, parameter in self._computed.items():
            parameter.register_post_accumulate_grad_hook(self._take(name))
        return {name: masters[parameter] for name, parameter in self._computed.items()}

    def _take(self, name: str) -> Callable[[Tensor], None]:
        """Return what to do with a finished gradient of a parameter: keep the first, add others in fp32."""

        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None
            before = self._gradients.get(name)
            self._gradients[name] = parameter.grad if before is None else before.float().add_(parameter.grad)
            parameter.grad = None

        return take

    def _renew_copies(self) -> None:
        """Copy the parameters, whoever changed them, to what the model computes with."""
        pairs = [(c, self.parameters[n]) for n, c in self._computed.items() if c is not self.parameters[n]]
        if pairs:
            copies, masters = zip(*pairs, strict=True)
            torch._foreach_copy_([c.detach() for c in copies], [m.detach() for m in masters])

    def forward(self, inputs: StepInputs) -> StepOutputs:
        """Run the model on one micro batch."""
        if not self._in_step:
            self._renew_copies()
            self._in_step = True
        return super().forward(inputs)

    @torch.no_grad()
    def evaluate(self, inputs: StepInputs) -> Tensor:
        """Return the summed cross entropy of this rank's tokens."""
        if not self._in_step:
            self._renew_copies()
        return super().evaluate(inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of ``loss``."""
        (loss * self.loss_scale.scale if self.loss_scale else loss).backward()

    @torch.no_grad()
    def step(self, learning_rate: float) -> StepResult:
        """Clip by the norm, apply AdamW, clear the gradient."""
        gradients = list(self._gradients.values())
        norms = torch.stack(torch._foreach_norm(gradients, 2, torch.float32)).double()
        for name, gradient in self._gradients.items():
            self.parameters[name].grad = gradient.float()
        del gradients
        self._gradients.clear()
        return self._apply(norms.square().sum().sqrt(), learning_rate)

    def discard(self) -> None:
        """Clear the gradient."""
        self._gradients.clear()
        self._in_step = False
        super().discard()
