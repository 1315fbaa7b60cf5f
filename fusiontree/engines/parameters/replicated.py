"""Parameters of which several ranks hold copies: engine ``ddp``'s, in flat buffers (:mod:`flat_buffer`).

A buffer's gradients are reduce-scattered when the last of them has arrived in the step's final backward pass, while the
pass goes on with the block before. The masters are gathered when the next forward pass begins, a few buffers ahead of
the module that computes.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fusiontree.engines.parameters.base import Decays, NamedPiece, Placement, as_global, put_in_place
from fusiontree.engines.parameters.flat_buffer import FlatBuffer
from fusiontree.optim.build import Leaf
from fusiontree.optim.config import OptimizerSpec
from fusiontree.parallel.shard_groups import DistributedModel, ShardGroup

AHEAD = 4
"""Buffers that are gathered while a module computes; with tensor parallelism a block has two or three."""

_Users = tuple[nn.Module, ...]
_Key = tuple[torch.dtype, dist.ProcessGroup, _Users]


class ReplicatedParameters(Placement):
    """All flat buffers of a model, in the order in which the forward pass needs them."""

    in_place = True
    fusable = True

    def __init__(self, model: DistributedModel, decays: Decays, optimizer: OptimizerSpec) -> None:
        super().__init__(model, decays, optimizer)
        self.buffers: list[FlatBuffer] = []
        self._last_pass = True  # the step's final backward pass is under way
        self._collected: dict[_Key, dict[str, nn.Parameter]] = {}
        self._used_by: dict[FlatBuffer, _Users] = {}
        self._order: list[FlatBuffer] = []
        self._started = self._awaited = 0  # gathers, in that order
        self._stale = True
        self._uncopied = True  # masters, where a fused step writes this rank's shards of the buffers
        self._travelling: deque[FlatBuffer] = deque()  # to be reduced

    def take(
        self,
        group: ShardGroup,
        parameters: dict[str, nn.Parameter],
        dtype: torch.dtype,
        mesh: DeviceMesh,
        block: ShardGroup,
    ) -> None:
        """Keep the parameters in a buffer with others of the same dtype and ranks that are used together.

        A block's parameters travel together, and so do the small fp32 parameters of all blocks; embedding and head
        compute at different ends of the pass.
        """
        used_by: _Users = group.modules if block.is_root else block.modules
        used_by = (self.model,) if group.keep_fp32 else used_by
        self._collected.setdefault((dtype, mesh.get_group("replicate"), used_by), {}).update(parameters)

    def end_block(self) -> None:
        """Make buffers of the parameters that later blocks add nothing to: memory never holds all of them twice."""
        self._build([key for key in self._collected if self.model not in key[2]])

    def finish(self, root: nn.Module) -> nn.Module:
        """Make the remaining buffers, and let each module wait for the buffers that it uses."""
        self._build(list(self._collected))
        model: Any = self.model
        self._in_order([model, model.embed, model.srte, *model.layers, model.head])
        return root

    def _build(self, keys: list[_Key]) -> None:
        for key in keys:
            dtype, group, used_by = key
            parameters = self._collected.pop(key)
            flat = FlatBuffer(len(self.buffers), parameters, dtype, group, self.decays, self.optimizer)
            self.buffers.append(flat)
            self._used_by[flat] = used_by
            put_in_place(self.model, flat.views)
            for place, view in enumerate(dict.fromkeys(flat.views.values())):
                view.register_post_accumulate_grad_hook(self._take(flat, place))

    def _in_order(self, modules: Sequence[nn.Module]) -> None:
        """Let each of ``modules``, in the order of the forward pass, wait for the buffers that it uses."""
        for module in modules:
            new = [flat for flat in self.buffers if module in self._used_by[flat] and flat not in self._order]
            if new:
                self._order += new
                module.register_forward_pre_hook(partial(self._before, len(self._order)))
        assert len(self._order) == len(self.buffers), "parameters of a module that the forward pass does not call"

    def leaves(self) -> Iterator[Leaf]:
        """Yield this rank's shards of the masters."""
        for flat in self.buffers:
            yield from (leaf for leaf in flat.optimized() if leaf.tensor.numel())

    def begin(self, training: bool = True) -> None:
        """Gather the masters where they may have changed since the last forward pass."""
        self.refresh()
        if self._stale:
            self._stale = False
            self._started = self._awaited = 0
            self._before(0)

    def mark_stale(self) -> None:
        """Note that the masters may have changed."""
        self._stale = self._uncopied = True

    def refresh(self) -> None:
        """Copy the masters to this rank's shards where others than a fused step may have written to them."""
        if self.fused and self._uncopied:
            self._uncopied = False
            for flat in self.buffers:
                flat.copy_masters()

    def _before(self, stop: int, *_: Any) -> None:
        """Wait for the first ``stop`` buffers, and start gathering the next."""
        while self._started < min(stop + AHEAD, len(self._order)):
            flat = self._order[self._started]
            if not self.fused:
                flat.copy_masters()
            flat.gather()
            self._started += 1
        while self._awaited < stop:
            self._order[self._awaited].await_gather()
            self._awaited += 1

    def _take(self, flat: FlatBuffer, place: int) -> Callable[[Tensor], None]:
        """Return the hook of a finished gradient.

        The hook must not hold an object that holds its parameter: Python does not see that cycle and would never free
        it.
        """
        me, its_buffer = weakref.ref(self), weakref.ref(flat)

        def take(parameter: Tensor) -> None:
            gradient, owner, flat = parameter.grad, me(), its_buffer()
            assert gradient is not None and owner is not None and flat is not None
            if flat.arrive(place, gradient):
                owner._end_pass_of(flat)
            parameter.grad = None

        return take

    def _end_pass_of(self, flat: FlatBuffer) -> None:
        if flat.reduced:
            return
        if not self._last_pass:
            flat.add_up()
            return
        # Buffers of this module and of the previous one stay in flight; wait for reductions that began before.
        travelling = self._travelling
        near = {self._used_by[flat]} | {self._used_by[other] for other in list(travelling)[-1:]}
        while travelling and self._used_by[travelling[0]] not in near:
            travelling.popleft().land()
        flat.add_up()
        flat.reduce()
        travelling.append(flat)

    def begin_backward(self, last: bool) -> None:
        """Note whether the step's final backward pass begins, in which gradients are reduced."""
        self._last_pass = last

    def end_backward(self) -> None:
        """End the pass of buffers that a gradient did not arrive at."""
        for flat in self.buffers:
            self._end_pass_of(flat)

    def wait_gradients(self) -> None:
        """Let later work of the device's stream come after all reductions."""
        while self._travelling:
            self._travelling.popleft().land()

    def pass_state(self) -> Any:
        """Return each buffer's gradients of this step, and how many buffers were gathered."""
        return [flat.pass_state() for flat in self.buffers], self._stale, self._started, self._awaited

    def set_pass_state(self, state: Any) -> None:
        """Put the host where it was at :meth:`pass_state`."""
        states, self._stale, self._started, self._awaited = state
        self._travelling.clear()
        for flat, its_state in zip(self.buffers, states, strict=True):
            flat.set_pass_state(its_state)

    def gradients(self) -> list[Tensor]:
        """Return this rank's shard of each buffer's gradient."""
        return [flat.gradient for flat in self.buffers if flat.gradient is not None]

    def set_gradients(self) -> None:
        """Give the gradients to the optimizer's tensors."""
        for flat in self.buffers:
            if flat.gradient is not None:
                for leaf, gradient in zip(flat.leaves, flat.cut(flat.gradient), strict=True):
                    leaf.grad = gradient

    def leaf_gradients(self) -> Iterator[Tensor | None]:
        """Yield this rank's shard of each buffer's gradient, cut as the buffer's leaves are."""
        for flat in self.buffers:
            given = (None, None) if flat.gradient is None else flat.cut(flat.gradient)
            yield from (gradient for leaf, gradient in zip(flat.leaves, given, strict=True) if leaf.numel())

    def discard(self) -> None:
        """Clear the gradients; the step is over, and may have changed the masters."""
        self._travelling.clear()
        for flat in self.buffers:
            flat.discard()
        self._stale = True

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield this rank's slices of the masters and of their states."""
        for flat in self.buffers:
            for kind, part, values in flat.state():
                yield f"{kind}.{part.name}", as_global(self.specs[part.name], values, part.start)
        self.mark_stale()  # the caller may write to them

    def parameter_pieces(self) -> Iterator[NamedPiece]:
        """Yield the full values that the last forward pass used."""
        for flat in self.buffers:
            for part in flat.slices:
                values = flat.views[part.name].detach().view(-1)
                yield from ((part.name, offset, piece) for offset, piece in self.specs[part.name].pieces(values))
