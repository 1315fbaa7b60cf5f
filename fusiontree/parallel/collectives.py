"""Exchanges between ranks that gradients pass through: each forward with its dual backward.

What context parallelism exchanges can be begun and awaited apart, so that it travels beside computation; the backward
then begins where the forward awaited, and awaits where the forward began.

Every rank of a group calls these in the same order, forward and backward. A result that a rank does not need must still
be part of its graph (times zero), or its backward would leave the peers waiting.

Shape legend: B rows, S tokens of a rank, axes after them are free. R ranks of the group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# Their names in torch 2.13, which warns of the older ones.
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


def gather_tokens(x_BS: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Put the ranks' tokens together, ``[B, S, …]`` to ``[B, R*S, …]``; the backward reduce-scatters the gradient."""
    return begin_gather_tokens(x_BS, group)()


def begin_gather_tokens(x_BS: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Begin :func:`gather_tokens`; the result awaits it."""
    _, arrive = _begin(_GatherTokens(group), x_BS)
    return lambda: arrive()[0]


def scatter_tokens(x_BS: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the ranks and keep an equal share of the tokens, ``[B, R*S, …]`` to ``[B, S, …]``.

    The backward all-gathers the gradient.
    """
    return _ScatterTokens.apply(x_BS, group)


def sum_identity(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the ranks; the backward passes the gradient on as it is.

    For sums that every rank of the group computes its loss from, when only one of these losses counts: each rank's
    own share of the sum then gets the gradient once.
    """
    return _SumIdentity.apply(x, group)


def left_halos(
    pieces: Sequence[Tensor], length: int, group: dist.ProcessGroup
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the pieces, to be used from here on, and the ``length`` tokens before each, zeros before the row's start.

    The tokens come from as many left neighbours as hold them, of all pieces in one message; the backward sends their
    gradients back and adds them to the last tokens of the pieces' own, in place: a sum over whole pieces would cost
    more than the message.

    Args:
        pieces: ``[B, S, …]``, of one dtype.
        length: tokens wanted, at least 1.
        group: ranks whose pieces make up the rows, in order.
    """
    same, arrive = begin_left_halos(pieces, length, group)
    return same, arrive()


def begin_left_halos(
    pieces: Sequence[Tensor], length: int, group: dist.ProcessGroup
) -> tuple[tuple[Tensor, ...], Callable[[], tuple[Tensor, ...]]]:
    """Begin :func:`left_halos`; return the pieces, to be used from here on, and what awaits the halos."""
    return _begin(_LeftHalos(length, group, [tuple(p.shape) for p in pieces]), *pieces)


def begin_swap_with_mirror(x: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Begin to exchange a tensor of equal shape with rank R-1-r; the result awaits it.

    The backward exchanges the gradients.
    """
    _, arrive = _begin(_Swap(group), x)
    return lambda: arrive()[0]


def gather_stack(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Stack the ranks' tensors, ``[…]`` to ``[R, …]``; the backward reduce-scatters the gradient."""
    return _GatherStack.apply(x, group)


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return ``[R, …]``."""
    stacked = x.new_empty(dist.get_world_size(group), *x.shape)
    getattr(dist, ALL_GATHER)(stacked.view(-1), x.contiguous().view(-1), group=group)
    return stacked


def _reduce_scatter(stacked: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum ``[R, …]`` over the ranks and return this rank's entry."""
    mine = stacked.new_empty(stacked.shape[1:])
    getattr(dist, REDUCE_SCATTER)(mine.view(-1), stacked.contiguous().view(-1), group=group)
    return mine


def _join(stacked_RBS: Tensor) -> Tensor:
    """``[R, B, S, …]`` to ``[B, R*S, …]``; no copy for one row."""
    return stacked_RBS.movedim(0, 1).flatten(1, 2)


def _part(x_BS: Tensor, ranks: int) -> Tensor:
    """``[B, R*S, …]`` to ``[R, B, S, …]``."""
    return x_BS.unflatten(1, (ranks, -1)).movedim(1, 0)


class _Exchange(Protocol):
    """One exchange: what is sent and how it lands, forward and backward.

    ``send`` and ``send_back`` begin; what they return is filled when the work is done.
    """

    def send(self, *inputs: Tensor) -> tuple[Tensor, dist.Work]: ...

    def land(self, arrived: Tensor) -> tuple[Tensor, ...]: ...

    def send_back(self, *grads: Tensor) -> tuple[Tensor, dist.Work]: ...

    def land_back(self, arrived: Tensor, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the gradients of the inputs; ``grads`` are those of the inputs' other uses."""
        ...

    passes: bool
    """Whether the inputs are used on after the exchange began."""


class _Flight:
    """An exchange on its way, and on its way back."""

    def __init__(self, exchange: _Exchange) -> None:
        self.exchange = exchange
        self.work: dist.Work | None = None
        self.back: tuple[Tensor, dist.Work] | None = None


def _begin(exchange: _Exchange, *inputs: Tensor) -> tuple[tuple[Tensor, ...], Callable[[], tuple[Tensor, ...]]]:
    """Begin an exchange; return the inputs, to be used from here on where it passes them, and what awaits it."""
    flight = _Flight(exchange)
    *same, arriving = _Begin.apply(flight, *inputs)
    return tuple(same), lambda: _Await.apply(flight, arriving)


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: _Flight, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.flight = flight
        arriving, flight.work = flight.exchange.send(*inputs)
        return *(x.view_as(x) for x in inputs if flight.exchange.passes), arriving

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        assert ctx.flight.back is not None, "what was begun was never awaited in the forward pass"
        arrived, work = ctx.flight.back
        ctx.flight.back = None
        work.wait()
        return None, *ctx.flight.exchange.land_back(arrived, grads[:-1])


class _Await(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: _Flight, arriving: Tensor) -> tuple[Tensor, ...]:
        ctx.flight = flight
        assert flight.work is not None
        flight.work.wait()
        flight.work = None
        ctx.shape = arriving.shape
        return flight.exchange.land(arriving)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        ctx.flight.back = ctx.flight.exchange.send_back(*grads)
        # The gradient itself is under way; this one, which nobody reads, only lets the graph go on.
        return None, grads[0].new_empty(1).expand(ctx.shape)


class _GatherTokens:
    passes = False

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.ranks = group, dist.get_world_size(group)

    def send(self, *inputs: Tensor) -> tuple[Tensor, dist.Work]:
        (x_BS,) = inputs
        stacked = x_BS.new_empty(self.ranks, *x_BS.shape)
        return stacked, getattr(dist, ALL_GATHER)(
            stacked.view(-1), x_BS.contiguous().view(-1), group=self.group, async_op=True
        )

    def land(self, arrived: Tensor) -> tuple[Tensor, ...]:
        return (_join(arrived),)

    def send_back(self, *grads: Tensor) -> tuple[Tensor, dist.Work]:
        stacked = _part(grads[0], self.ranks)
        mine = stacked.new_empty(stacked.shape[1:])
        return mine, getattr(dist, REDUCE_SCATTER)(
            mine.view(-1), stacked.contiguous().view(-1), group=self.group, async_op=True
        )

    def land_back(self, arrived: Tensor, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arrived,)


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BS: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(_part(x_BS, dist.get_world_size(group)), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _join(_all_gather(grads[0], ctx.group)), None


class _GatherStack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grads[0], ctx.group), None


class _SumIdentity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Swap:
    passes = False

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.mirror = group, dist.get_world_size(group) - 1 - dist.get_rank(group)

    def send(self, *inputs: Tensor) -> tuple[Tensor, dist.Work]:
        self.shape = tuple(inputs[0].shape)
        return _exchange({self.mirror: inputs[0]}, {self.mirror: inputs[0].numel()}, inputs[0], self.group)

    def land(self, arrived: Tensor) -> tuple[Tensor, ...]:
        return (arrived.view(self.shape),)

    def send_back(self, *grads: Tensor) -> tuple[Tensor, dist.Work]:
        return _exchange({self.mirror: grads[0]}, {self.mirror: grads[0].numel()}, grads[0], self.group)

    def land_back(self, arrived: Tensor, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arrived.view(self.shape),)


class _LeftHalos:
    passes = True

    def __init__(self, length: int, group: dist.ProcessGroup, shapes: list[tuple[int, ...]]) -> None:
        self.length, self.group, self.shapes = length, group, shapes
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.rows, self.size = shapes[0][:2]
        self.counts = _halo_counts(length, self.size)
        self.widths = [math.prod(shape[2:]) for shape in shapes]

    def send(self, *inputs: Tensor) -> tuple[Tensor, dist.Work]:
        most = self.counts[0]
        last_BSC = torch.cat([piece[:, self.size - most :].flatten(2) for piece in inputs], dim=-1)
        send, sizes = {}, {}
        for back, count in enumerate(self.counts, start=1):
            if self.rank + back < self.ranks:
                send[self.rank + back] = last_BSC[:, most - count :]
            if self.rank - back >= 0:
                sizes[self.rank - back] = self.rows * count * sum(self.widths)
        return _exchange(send, sizes, last_BSC, self.group)

    def land(self, arrived: Tensor) -> tuple[Tensor, ...]:
        # Of the farthest neighbour first, and zeros for those that do not exist.
        width = sum(self.widths)
        counts = [count for back, count in enumerate(self.counts, start=1) if self.rank - back >= 0][::-1]
        parts = arrived.split([self.rows * count * width for count in counts]) if counts else ()
        there = [part.view(self.rows, count, width) for part, count in zip(parts, counts, strict=True)]
        missing = arrived.new_zeros(self.rows, self.length - sum(counts), width)
        halos = torch.cat([missing, *there], dim=1).split(self.widths, dim=-1)
        return tuple(
            halo.contiguous().view(self.rows, self.length, *shape[2:])
            for halo, shape in zip(halos, self.shapes, strict=True)
        )

    def send_back(self, *grads: Tensor) -> tuple[Tensor, dist.Work]:
        grad_BSC = torch.cat([grad.flatten(2) for grad in grads], dim=-1)
        send, sizes = {}, {}
        end = self.length
        for back, count in enumerate(self.counts, start=1):
            if self.rank - back >= 0:
                send[self.rank - back] = grad_BSC[:, end - count : end]
            if self.rank + back < self.ranks:
                sizes[self.rank + back] = self.rows * count * grad_BSC.shape[2]
            end -= count
        return _exchange(send, sizes, grad_BSC, self.group)

    def land_back(self, arrived: Tensor, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        totals = tuple(grad.contiguous() for grad in grads)  # an expanded one could not be added to
        counts = [count for back, count in enumerate(self.counts, start=1) if self.rank + back < self.ranks]
        for part, count in zip(arrived.split([self.rows * c * sum(self.widths) for c in counts]), counts, strict=True):
            values = part.view(self.rows, count, -1).split(self.widths, dim=-1)
            for total, own in zip(totals, values, strict=True):
                total[:, self.size - count :] += own.reshape(self.rows, count, *total.shape[2:])
        return totals


def _halo_counts(length: int, piece: int) -> list[int]:
    """Tokens of a halo that each left neighbour holds, the nearest first."""
    return [min(piece, length - begin) for begin in range(0, length, piece)]


def _exchange(
    send: dict[int, Tensor], sizes: dict[int, int], like: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, dist.Work]:
    """Begin to send tensors to ranks of the group and to receive so many elements; all ranks call this together.

    Returns what arrives, flat, in the order of the ranks. One call of the library, where pairs of sends and receives
    would cost the host several.
    """
    ranks = range(dist.get_world_size(group))
    flat = [send[rank].reshape(-1) if rank in send else like.new_empty(0) for rank in ranks]
    expected = [sizes.get(rank, 0) for rank in ranks]
    arrived = like.new_empty(sum(expected))
    given = [part.numel() for part in flat]
    work = dist.all_to_all_single(arrived, torch.cat(flat), expected, given, group=group, async_op=True)
    return arrived, work
