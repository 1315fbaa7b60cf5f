"""Parameters that no other rank shares: nothing to gather, nothing to reduce.

All of a job with one process, and the heads' parameters where tensor parallelism takes every rank. ``fully_shard`` over
one rank would copy every parameter three times on its way from fp32 to the 16-bit type, twice a step, and every
gradient twice on its way back. Here the model holds 16-bit copies beside the fp32 parameters that the optimizer works
on. Gradients of one micro-batch stay as the backward pass made them, and those of several are added up in fp32. A
fused step of the optimizer reads them as they are and writes the copies; another one gets fp32 gradients, and the
copies are written before the next step's first forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fusiontree.engines.parameters.base import Decays, NamedPiece, Placement, as_global, put_in_place
from fusiontree.optim.build import Leaf, new_states
from fusiontree.optim.config import OptimizerSpec
from fusiontree.parallel.shard_groups import DistributedModel, ShardGroup


class LocalParameters(Placement):
    """fp32 parameters and, in mixed precision, the copies of them that the model computes with."""

    in_place = True
    fusable = True

    def __init__(self, model: DistributedModel, decays: Decays, optimizer: OptimizerSpec) -> None:
        super().__init__(model, decays, optimizer)
        self._masters: dict[str, nn.Parameter] = {}  # a tied one has its first name
        self._copies: dict[nn.Parameter, Tensor] = {}  # of a master, in the dtype of the model
        self._states: dict[str, dict[str, Tensor]] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}  # of this step, by master
        self._in_step = False
        self._stale = True  # the copies, where a fused step writes them

    def take(
        self,
        group: ShardGroup,
        parameters: dict[str, nn.Parameter],
        dtype: torch.dtype,
        mesh: DeviceMesh,
        block: ShardGroup,
    ) -> None:
        """Keep the parameters, and let the model compute with them in ``dtype``."""
        copies: dict[nn.Parameter, nn.Parameter] = {}
        for name, parameter in parameters.items():
            if parameter in copies:
                continue
            copy = parameter if parameter.dtype == dtype else nn.Parameter(parameter.detach().to(dtype))
            copies[parameter] = copy
            if copy is not parameter:
                self._copies[parameter] = copy.detach()
            self._masters[name] = parameter
            self._states[name] = new_states(self.optimizer, parameter)
            copy.register_post_accumulate_grad_hook(_take(None if copy is parameter else parameter, self._gradients))
        put_in_place(self.model, {name: copies[parameter] for name, parameter in parameters.items()})

    def leaves(self) -> Iterator[Leaf]:
        """Yield the fp32 parameters."""
        for name, master in self._masters.items():
            yield Leaf(master, self.decays(name, master), self._states[name], self._copies.get(master))

    def begin(self, training: bool) -> None:
        """Copy the parameters to those that the model computes with; once per training step."""
        if self._in_step:
            return
        if self.fused:
            self.refresh()
        else:
            self._copy()
        self._in_step = training

    @torch.no_grad()
    def _copy(self) -> None:
        if self._copies:
            torch._foreach_copy_(list(self._copies.values()), list(self._copies))

    def refresh(self) -> None:
        """Copy the parameters where others than a fused step may have written to them."""
        if self.fused and self._stale:
            self._copy()
            self._stale = False

    def mark_stale(self) -> None:
        """Note that the parameters may have changed."""
        self._stale = True

    def pass_state(self) -> Any:
        """Return the gradients of this step, and whether the parameters were copied."""
        return dict(self._gradients), self._in_step

    def set_pass_state(self, state: Any) -> None:
        """Put the host where it was at :meth:`pass_state`."""
        gradients, self._in_step = state
        self._gradients.clear()  # the hooks hold this dictionary
        self._gradients.update(gradients)

    def gradients(self) -> list[Tensor]:
        """Return the gradients as the backward passes made or summed them."""
        return list(self._gradients.values())

    def set_gradients(self) -> None:
        """Give the gradients to the optimizer's parameters, in fp32."""
        narrow: list[tuple[Tensor, Tensor]] = []  # fp32 gradient and its 16-bit values
        for master in self._masters.values():
            gradient = self._gradients.pop(master, None)
            if gradient is None:
                master.grad = torch.zeros_like(master)
            elif gradient.dtype == master.dtype:
                master.grad = gradient
            else:
                master.grad = torch.empty_like(master)
                narrow.append((master.grad, gradient))
        if narrow:  # few launches for all parameters
            wide, given = zip(*narrow, strict=True)
            torch._foreach_copy_(list(wide), list(given))

    def leaf_gradients(self) -> Iterator[Tensor | None]:
        """Yield the gradients as the backward passes made or summed them."""
        yield from (self._gradients.get(master) for master in self._masters.values())

    def discard(self) -> None:
        """Clear the gradients; the step is over."""
        self._gradients.clear()
        for master in self._masters.values():
            master.grad = None
        self._in_step = False

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters and their states."""
        for name, master in self._masters.items():
            yield f"model.{name}", self._located(name, master.detach())
            for state, values in self._states[name].items():
                yield f"optimizer.{state}.{name}", self._located(name, values)
        self.mark_stale()  # the caller may write to them

    def _located(self, name: str, values: Tensor) -> Tensor:
        spec = self.specs[name]
        return as_global(spec, values, 0) if spec.is_split else values

    def parameter_pieces(self) -> Iterator[NamedPiece]:
        """Yield the fp32 parameters."""
        for name, master in self._masters.items():
            yield from ((name, offset, values) for offset, values in self.specs[name].pieces(master.detach().view(-1)))


def _take(master: nn.Parameter | None, gradients: dict[nn.Parameter, Tensor]) -> Callable[[nn.Parameter], None]:
    """Return the hook of a finished gradient: it keeps the first and adds others in fp32.

    The hook must hold neither its own parameter (``master`` is None where that is the optimizer's too) nor an object
    that holds the parameter: Python does not see that cycle and would never free it.
    """

    def take(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        owner = parameter if master is None else master
        before = gradients.get(owner)
        gradients[owner] = parameter.grad if before is None else before.float().add_(parameter.grad)
        parameter.grad = None

    return take
