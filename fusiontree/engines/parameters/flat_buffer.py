"""A flat buffer: parameters side by side, replicated on every rank; gradients and optimizer state are sharded.

As in ZeRO stage 1, but block by block: rank r of n owns the r-th n-th of the buffer. Gradients are added up in fp32 and
reduce-scattered, so that each rank has the sum of its own shard; the optimizer changes that shard of the masters;
before the next forward pass the shards, cast to the dtype of the model, are all-gathered in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusiontree.engines.parameters.base import Decays
from fusiontree.engines.parameters.flat_slice import FlatLayout, FlatSlice
from fusiontree.optim.build import Leaf, new_states
from fusiontree.optim.config import OptimizerSpec
from fusiontree.parallel.collectives import ALL_GATHER, REDUCE_SCATTER


class FlatBuffer:
    """Parameters that are used together, of one dtype, replicated over one process group.

    All ranks call the methods that begin a collective in the same order.
    """

    @torch.no_grad()
    def __init__(
        self,
        index: int,
        parameters: dict[str, nn.Parameter],
        dtype: torch.dtype,
        group: dist.ProcessGroup,
        decays: Decays,
        optimizer: OptimizerSpec,
    ) -> None:
        """Copy the parameters into a buffer.

        Args:
            index: of this buffer among all, which its slices bear.
            parameters: fp32 values by name; the same on all ranks. A tied parameter has its first name in the buffer.
            dtype: of the values that the model computes with.
            group: the ranks with copies of the parameters.
            decays: tells from name and parameter whether weight decay applies.
            optimizer: its states.
        """
        first_names: dict[nn.Parameter, str] = {}
        for name, parameter in parameters.items():
            first_names.setdefault(parameter, name)
        values = {name: parameter for parameter, name in first_names.items()}
        rank = dist.get_rank(group)
        layout = FlatLayout(
            {name: parameter.numel() for name, parameter in values.items()},
            lambda name: decays(name, values[name]),
            dist.get_world_size(group),
        )
        device = next(iter(first_names)).device
        self._group = group
        self._whole = torch.zeros(layout.size, dtype=dtype, device=device)
        self._mine = self._whole.narrow(0, rank * layout.shard, layout.shard)
        self.master = torch.zeros(layout.shard, device=device)
        """fp32 values of this rank's shard."""
        self.states = new_states(optimizer, self.master)
        """The optimizer's, of this rank's shard."""
        self.slices = layout.slices(rank, index)
        """This rank's slice of each parameter, in the buffer's order."""
        self.views = self._fill(values, layout)
        """Parameters that the model computes with, by name; in the buffer's order."""
        self._shapes = [values[name].shape for name in layout.names]
        for name, parameter in parameters.items():
            self.views.setdefault(name, self.views[first_names[parameter]])
        self._sizes = layout.sizes
        self._gaps = [place for place, gap in enumerate(self._sizes) if place % 2 and gap]
        self._border = layout.border(rank)
        self.leaves = self.cut(self.master)
        """The optimizer's tensors: of this rank's shard, the parts with and without weight decay; may be empty."""
        self.gradient: Tensor | None = None
        """Of this rank's shard, summed over the ranks, once :meth:`land` was called."""
        self._arrived: dict[int, Tensor] = {}
        self._sums: Tensor | None = None
        self._places: list[Tensor] = []  # of the parameters in the sums
        self._reduction: dist.Work | None = None
        self._gathering: dist.Work | None = None

    def _fill(self, values: dict[str, nn.Parameter], layout: FlatLayout) -> dict[str, nn.Parameter]:
        """Copy values to the master weights and to the buffer; return the buffer's views of each parameter."""
        views: dict[str, nn.Parameter] = {}
        for part in self.slices:
            flat = values[part.name].reshape(-1)
            part.of(self.master).copy_(flat.narrow(0, part.start, part.length))
            view = self._whole.narrow(0, layout.starts[part.name], flat.numel())
            view.copy_(flat)
            views[part.name] = nn.Parameter(view.view_as(values[part.name]))
        return views

    def cut(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values of this rank's shard with weight decay and the others; they share memory with ``flat``."""
        return flat[: self._border], flat[self._border :]

    def optimized(self) -> list[Leaf]:
        """Return the optimizer's tensors: first those with weight decay, then the others; either may be empty."""
        states = {kind: self.cut(values) for kind, values in self.states.items()}
        copies = self.cut(self._mine)
        return [
            Leaf(tensor, index == 0, {kind: cut[index] for kind, cut in states.items()}, copies[index])
            for index, tensor in enumerate(self.leaves)
        ]

    def state(self) -> Iterator[tuple[str, FlatSlice, Tensor]]:
        """Yield for each parameter ``model`` and ``optimizer.STATE``, this rank's slice, and the slice's values."""
        flats = {"model": self.master} | {f"optimizer.{kind}": values for kind, values in self.states.items()}
        for part in self.slices:
            yield from ((kind, part, part.of(flat)) for kind, flat in flats.items())

    @torch.no_grad()
    def copy_masters(self) -> None:
        """Write the masters to this rank's shard of the buffer."""
        self._mine.copy_(self.master)

    def gather(self) -> None:
        """Begin to gather all ranks' shards of the buffer."""
        self._gathering = getattr(dist, ALL_GATHER)(self._whole, self._mine, group=self._group, async_op=True)

    def await_gather(self) -> None:
        """Let later work of the device's stream come after the gather; the host does not wait."""
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None

    def arrive(self, place: int, gradient: Tensor) -> bool:
        """Take the gradient of the parameter at index ``place``; return True if it completes the buffer's gradients."""
        self._arrived[place] = gradient
        return len(self._arrived) == len(self._shapes)

    @torch.no_grad()
    def add_up(self) -> None:
        """Add the gradients that arrived to the step's sums; those that did not arrive are zero."""
        first = self._sums is None
        if self._sums is None:
            self._sums = torch.empty(self._whole.shape, device=self._whole.device)
            pieces = self._sums.split(self._sizes)
            self._places = [piece.view(shape) for piece, shape in zip(pieces[::2], self._shapes, strict=True)]
            if len(self._arrived) < len(self._shapes):
                self._sums.zero_()
            elif self._gaps:  # the norm counts them
                torch._foreach_zero_([pieces[place] for place in self._gaps])
        if self._arrived:
            places = [self._places[place] for place in self._arrived]
            (torch._foreach_copy_ if first else torch._foreach_add_)(places, list(self._arrived.values()))
            self._arrived.clear()

    @property
    def reduced(self) -> bool:
        """Whether the step's reduction has begun."""
        return self._reduction is not None

    def reduce(self) -> None:
        """Begin to sum the gradients over the ranks; each rank gets its shard of the sum."""
        assert self._sums is not None
        self.gradient = torch.empty_like(self.master)
        reduce_scatter = getattr(dist, REDUCE_SCATTER)
        self._reduction = reduce_scatter(self.gradient, self._sums, group=self._group, async_op=True)

    def land(self) -> None:
        """Let later work of the device's stream come after the reduction, and free the sums that were sent."""
        if self._reduction is not None and self._sums is not None:
            self._reduction.wait()
            self._sums, self._places = None, []

    def pass_state(self) -> Any:
        """Return the references to this step's gradients, and its reduction."""
        return self._sums, self._places, self._reduction, self.gradient

    def set_pass_state(self, state: Any) -> None:
        """Put the references where they were at :meth:`pass_state`."""
        self._sums, self._places, self._reduction, self.gradient = state
        self._arrived.clear()

    def discard(self) -> None:
        """Drop the gradients; the step is over."""
        self.land()
        self._arrived.clear()
        self._sums, self._places, self._reduction, self.gradient = None, [], None, None
        for leaf in self.leaves:
            leaf.grad = None
