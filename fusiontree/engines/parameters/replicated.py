"""Parameters of which several ranks hold copies: engine ``ddp``'s, in flat groups (:mod:`flat_group`).

A group's gradients are reduce-scattered when the last of them has arrived in the step's final backward pass, while the
pass goes on with the block before. The masters are gathered when the next forward pass begins, a few groups ahead of
the module that computes.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusiontree.engines.parameters.flat_buffer import FlatBuffer
from fusiontree.engines.parameters.local import put_in_place
from fusiontree.optim.config import OptimizerSpec

AHEAD = 4
"""Groups that are on their way while a module computes; with tensor parallelism a block has two or three."""

_Users = tuple[nn.Module, ...]
_Key = tuple[torch.dtype, dist.ProcessGroup, _Users]


class ReplicatedParameters:
    """All flat groups of a model, in the order in which the forward pass needs them."""

    def __init__(self, model: nn.Module, decays: Callable[[str, nn.Parameter], bool], optimizer: OptimizerSpec) -> None:
        """Start with none; ``decays`` tells from name and parameter whether weight decay applies."""
        self.groups: list[FlatBuffer] = []
        self.last_pass = True
        """Whether the step's final backward pass is under way."""
        self._model, self._decays, self._optimizer = model, decays, optimizer
        self._collected: dict[_Key, dict[str, nn.Parameter]] = {}
        self._used_by: dict[FlatBuffer, _Users] = {}
        self._order: list[FlatBuffer] = []
        self._started = self._awaited = 0  # gathers, in that order
        self._stale = True
        self._travelling: deque[FlatBuffer] = deque()  # to be reduced

    def collect(
        self, parameters: dict[str, nn.Parameter], dtype: torch.dtype, group: dist.ProcessGroup, used_by: _Users
    ) -> None:
        """Take fp32 parameters by name; what has ``dtype``, ``group`` and ``used_by`` in common lies together.

        ``used_by`` are the modules whose forward needs them first; they are gathered by then.
        """
        self._collected.setdefault((dtype, group, used_by), {}).update(parameters)

    def build(self, later: nn.Module | None = None) -> None:
        """Make groups of what was collected, but for what ``later`` uses, and let the model compute with them."""
        for key in [key for key in self._collected if later not in key[2]]:
            dtype, group, used_by = key
            flat = FlatBuffer(len(self.groups), self._collected.pop(key), dtype, group, self._decays, self._optimizer)
            self.groups.append(flat)
            self._used_by[flat] = used_by
            put_in_place(self._model, flat.views)
            for place, view in enumerate(dict.fromkeys(flat.views.values())):
                view.register_post_accumulate_grad_hook(self._take(flat, place))

    def in_order(self, modules: Sequence[nn.Module]) -> None:
        """Let each of ``modules``, given as the forward pass comes to them, wait for the groups that it uses."""
        for module in modules:
            new = [group for group in self.groups if module in self._used_by[group] and group not in self._order]
            if new:
                self._order += new
                module.register_forward_pre_hook(partial(self._before, len(self._order)))
        assert len(self._order) == len(self.groups), "parameters of a module that the forward pass does not come to"

    def begin(self) -> None:
        """A forward pass begins: bring the masters to the model where they may have changed since the last one."""
        if self._stale:
            self._stale = False
            self._started = self._awaited = 0
            self._before(0)

    def changed(self) -> None:
        """Note that the masters may have changed."""
        self._stale = True

    def _before(self, stop: int, *_: Any) -> None:
        """Wait for the first ``stop`` groups, and start gathering the next ones."""
        while self._started < min(stop + AHEAD, len(self._order)):
            self._order[self._started].gather()
            self._started += 1
        while self._awaited < stop:
            self._order[self._awaited].await_gather()
            self._awaited += 1

    def _take(self, group: FlatBuffer, place: int) -> Callable[[Tensor], None]:
        """Return what to do with a finished gradient.

        The hook must not hold what holds its parameter: Python does not see that circle, and would never free it.
        """
        me, its_group = weakref.ref(self), weakref.ref(group)

        def take(parameter: Tensor) -> None:
            gradient, owner, group = parameter.grad, me(), its_group()
            assert gradient is not None and owner is not None and group is not None
            if group.arrive(place, gradient):
                owner._end_pass_of(group)
            parameter.grad = None

        return take

    def _end_pass_of(self, group: FlatBuffer) -> None:
        if group.reduced:
            return
        if not self.last_pass:
            group.add_up()
            return
        # What this module and the one before it send is under way; of the others it has arrived, or is waited for.
        travelling = self._travelling
        near = {self._used_by[group]} | {self._used_by[other] for other in list(travelling)[-1:]}
        while travelling and self._used_by[travelling[0]] not in near:
            travelling.popleft().land()
        group.add_up()
        group.reduce()
        travelling.append(group)

    def end_pass(self) -> None:
        """A backward pass is over: gradients that waited for one that does not come go on."""
        for group in self.groups:
            self._end_pass_of(group)

    def await_gradients(self) -> None:
        """Let later work of the device's stream come after all reductions."""
        while self._travelling:
            self._travelling.popleft().land()

    def gradients(self) -> list[Tensor]:
        """Return this rank's part of each group's gradient."""
        return [group.gradient for group in self.groups if group.gradient is not None]

    def hand_over(self) -> None:
        """Give the gradients to the optimizer's parameters."""
        for group in self.groups:
            if group.gradient is not None:
                for leaf, gradient in zip(group.leaves, group.cut(group.gradient), strict=True):
                    leaf.grad = gradient

    def discard(self) -> None:
        """Clear the gradients; the step is over, and may have changed the masters."""
        self._travelling.clear()
        for group in self.groups:
            group.discard()
        self.changed()
