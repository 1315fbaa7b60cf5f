"""Parameters side by side in one flat buffer: whole on every rank, gradients and optimizer state cut over the ranks.

What ZeRO stage 1 does, block by block: rank r of n owns the r-th n-th of the buffer. Gradients are added up in fp32 and
reduce-scattered, so that each rank has the sum of its own part; it applies AdamW to that part of the master weights;
before the next forward pass the parts, cast to what the model computes with, are all-gathered in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusiontree.engines.parameters.flat_slice import FlatSlice
from fusiontree.optim.build import Leaf, new_states
from fusiontree.optim.config import OptimizerSpec
from fusiontree.parallel.collectives import ALL_GATHER, REDUCE_SCATTER

ALIGNMENT = 64
"""Elements: each parameter starts at a multiple, as vector loads and matrix products want it, and so does each part."""


class FlatBuffer:
    """Parameters that are used together, of one type, copied over one process group.

    Those with weight decay come first, so that a rank's part falls into at most two pieces for the optimizer. All ranks
    call the methods that begin a collective in the same order.
    """

    @torch.no_grad()
    def __init__(
        self,
        index: int,
        parameters: dict[str, nn.Parameter],
        dtype: torch.dtype,
        group: dist.ProcessGroup,
        decays: Callable[[str, nn.Parameter], bool],
        optimizer: OptimizerSpec,
    ) -> None:
        """Lay the parameters out.

        Args:
            index: of this group among all, which its parts bear.
            parameters: fp32 values by name; the same on all ranks. A tied parameter goes by its first name.
            dtype: what the model computes with.
            group: the ranks with copies of the parameters.
            decays: tells from name and parameter whether weight decay applies.
            optimizer: its states.
        """
        names: dict[nn.Parameter, str] = {}
        for name, parameter in parameters.items():
            names.setdefault(parameter, name)
        ordered = sorted(names, key=lambda parameter: not decays(names[parameter], parameter))
        starts, end, border = [], 0, 0
        for parameter in ordered:
            starts.append(end)
            end = _round_up(end + parameter.numel())
            if decays(names[parameter], parameter):
                border = end
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        size = _round_up(-(-end // ranks))
        begin = rank * size
        device = ordered[0].device
        self._group = group
        self._whole = torch.zeros(ranks * size, dtype=dtype, device=device)
        self._mine = self._whole.narrow(0, begin, size)
        self.master = torch.zeros(size, device=device)
        """fp32 values of this rank's part."""
        self.states = new_states(optimizer, self.master)
        """The optimizer's, of this rank's part."""
        self.parts: list[FlatSlice] = []
        """What this rank owns of each parameter."""
        self.views: dict[str, nn.Parameter] = {}
        """What the model computes with, by name; in the buffer's order."""
        self._sizes: list[int] = []  # of each parameter and of the gap behind it
        for parameter, start, after in zip(ordered, starts, [*starts[1:], ranks * size], strict=True):
            count, values = parameter.numel(), parameter.reshape(-1)
            low, high = max(begin, start), min(begin + size, start + count)
            part = FlatSlice(names[parameter], index, low - begin, low - start, high - low)
            if high <= low:
                part = FlatSlice(names[parameter], index, 0, 0, 0)
            part.of(self.master).copy_(values.narrow(0, part.start, part.length))
            self.parts.append(part)
            view = self._whole.narrow(0, start, count)
            view.copy_(values)
            self.views[names[parameter]] = nn.Parameter(view.view_as(parameter))
            self._sizes += [count, after - start - count]
        for name, parameter in parameters.items():
            self.views.setdefault(name, self.views[names[parameter]])
        self._shapes = [parameter.shape for parameter in ordered]
        self._gaps = [place for place, gap in enumerate(self._sizes) if place % 2 and gap]
        self._border = min(max(border - begin, 0), size)
        self.leaves = self.cut(self.master)
        """What the optimizer works on: of this rank's part, what decays and what does not; either may be empty."""
        self.gradient: Tensor | None = None
        """Of this rank's part, summed over the ranks, once :meth:`land` was called."""
        self._arrived: dict[int, Tensor] = {}
        self._sums: Tensor | None = None
        self._places: list[Tensor] = []  # of the parameters in the sums
        self._reduction: dist.Work | None = None
        self._gathering: dist.Work | None = None

    def cut(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Return of values of this rank's part those that decay and the others; they share memory with ``flat``."""
        return flat[: self._border], flat[self._border :]

    def optimized(self) -> list[Leaf]:
        """Return the optimizer's tensors: first those with weight decay, then the others; either may be empty."""
        states = {kind: self.cut(values) for kind, values in self.states.items()}
        return [
            Leaf(tensor, index == 0, {kind: cut[index] for kind, cut in states.items()})
            for index, tensor in enumerate(self.leaves)
        ]

    def state(self) -> Iterator[tuple[str, FlatSlice, Tensor]]:
        """Yield for each parameter ``model`` and ``optimizer.STATE``, what this rank owns of it, and its values."""
        flats = {"model": self.master} | {f"optimizer.{kind}": values for kind, values in self.states.items()}
        for part in self.parts:
            yield from ((kind, part, part.of(flat)) for kind, flat in flats.items())

    @torch.no_grad()
    def gather(self) -> None:
        """Begin to bring every rank's part of the master weights to what the model computes with."""
        self._mine.copy_(self.master)
        self._gathering = getattr(dist, ALL_GATHER)(self._whole, self._mine, group=self._group, async_op=True)

    def await_gather(self) -> None:
        """Let later work of the device's stream come after the gather; the host goes on."""
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None

    def arrive(self, place: int, gradient: Tensor) -> bool:
        """Take the gradient that a pass gave the parameter at ``place``; return whether it was the last to come."""
        self._arrived[place] = gradient
        return len(self._arrived) == len(self._shapes)

    @torch.no_grad()
    def add_up(self) -> None:
        """Add what arrived to the step's sums; what did not arrive is zero."""
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
        """Begin to sum the gradients over the ranks, each rank's own part for it."""
        assert self._sums is not None
        self.gradient = torch.empty_like(self.master)
        reduce_scatter = getattr(dist, REDUCE_SCATTER)
        self._reduction = reduce_scatter(self.gradient, self._sums, group=self._group, async_op=True)

    def land(self) -> None:
        """Let later work of the device's stream come after the reduction, and give up what was sent."""
        if self._reduction is not None and self._sums is not None:
            self._reduction.wait()
            self._sums, self._places = None, []

    def discard(self) -> None:
        """Forget the gradients; the step is over."""
        self.land()
        self._arrived.clear()
        self._sums, self._places, self._reduction, self.gradient = None, [], None, None
        for leaf in self.leaves:
            leaf.grad = None


def _round_up(elements: int) -> int:
    return -(-elements // ALIGNMENT) * ALIGNMENT
