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


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the ranks' tensors as ``[R, …]``; no gradient."""
    stacked = x.new_empty(dist.get_world_size(group), *x.shape)
    getattr(dist, ALL_GATHER)(stacked.view(-1), x.contiguous().view(-1), group=group)
    return stacked


def reduce_scatter(stacked: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum ``[R, …]`` over the ranks and return this rank's entry; no gradient."""
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
        return reduce_scatter(_part(x_BS, dist.get_world_size(group)), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _join(all_gather(grads[0], ctx.group)), None


class _GatherStack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grads[0], ctx.group), None


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
        return _exchange({self.mirror: [inputs[0]]}, {self.mirror: inputs[0].numel()}, inputs[0], self.group)

    def land(self, arrived: Tensor) -> tuple[Tensor, ...]:
        return (arrived.view(self.shape),)

    def send_back(self, *grads: Tensor) -> tuple[Tensor, dist.Work]:
        return _exchange({self.mirror: [grads[0]]}, {self.mirror: grads[0].numel()}, grads[0], self.group)

    def land_back(self, arrived: Tensor, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arrived.view(self.shape),)


class _LeftHalos:
    """A message holds piece after piece, each flat: what arrives needs no copy where one neighbour holds a halo."""

    passes = True

    def __init__(self, length: int, group: dist.ProcessGroup, shapes: list[tuple[int, ...]]) -> None:
        self.length, self.group, self.shapes = length, group, shapes
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.rows, self.size = shapes[0][:2]
        self.widths = [math.prod(shape[2:]) for shape in shapes]
        counts = enumerate(_halo_counts(length, self.size), start=1)
        self.left, self.right = {}, {}  # tokens of a halo, by the rank that holds them or that wants them
        for back, count in counts:
            if self.rank - back >= 0:
                self.left[self.rank - back] = count
            if self.rank + back < self.ranks:
                self.right[self.rank + back] = count

    def send(self, *inputs: Tensor) -> tuple[Tensor, dist.Work]:
        send = {rank: [piece[:, self.size - count :] for piece in inputs] for rank, count in self.right.items()}
        return _exchange(send, self._sizes(self.left), inputs[0], self.group)

    def land(self, arrived: Tensor) -> tuple[Tensor, ...]:
        # Of the farthest neighbour first, and zeros for those that do not exist.
        messages = [self._pieces(*part) for part in self._parts(arrived, self.left)]
        missing = self.length - sum(self.left.values())
        if missing:
            messages.insert(0, self._pieces(arrived.new_zeros(self.rows * missing * sum(self.widths)), missing))
        return tuple(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in zip(*messages, strict=True))

    def send_back(self, *grads: Tensor) -> tuple[Tensor, dist.Work]:
        send = {}
        begin = self.length - sum(self.left.values())
        for rank, count in sorted(self.left.items()):
            send[rank] = [grad[:, begin : begin + count] for grad in grads]
            begin += count
        return _exchange(send, self._sizes(self.right), grads[0], self.group)

    def land_back(self, arrived: Tensor, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        totals = tuple(grad.contiguous() for grad in grads)  # an expanded one could not be added to
        for part, count in self._parts(arrived, self.right):
            for total, own in zip(totals, self._pieces(part, count), strict=True):
                total[:, self.size - count :].add_(own)  # += would copy the slice onto itself
        return totals

    def _sizes(self, counts: dict[int, int]) -> dict[int, int]:
        return {rank: self.rows * count * sum(self.widths) for rank, count in counts.items()}

    def _parts(self, arrived: Tensor, counts: dict[int, int]) -> list[tuple[Tensor, int]]:
        """Cut what arrived into the messages of each rank, in their order, each with its number of tokens."""
        sizes = self._sizes(counts)
        ranks = sorted(counts)
        return list(zip(arrived.split([sizes[rank] for rank in ranks]), [counts[rank] for rank in ranks], strict=True))

    def _pieces(self, message: Tensor, count: int) -> list[Tensor]:
        """Cut a message of ``count`` tokens into its pieces ``[B, count, …]``."""
        flat = message.split([self.rows * count * width for width in self.widths])
        return [part.view(self.rows, count, *shape[2:]) for part, shape in zip(flat, self.shapes, strict=True)]


def _halo_counts(length: int, piece: int) -> list[int]:
    """Tokens of a halo that each left neighbour holds, the nearest first."""
    return [min(piece, length - begin) for begin in range(0, length, piece)]


def _exchange(
    send: dict[int, list[Tensor]], sizes: dict[int, int], like: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, dist.Work]:
    """Begin to send tensors to ranks of the group and to receive so many elements; all ranks call this together.

    Returns what arrives, flat, in the order of the ranks; each rank's tensors are one message, flat, one after the
    other. One call of the library, where pairs of sends and receives would cost the host several.
    """
    ranks = range(dist.get_world_size(group))
    flat = [part.reshape(-1) for rank in ranks for part in send.get(rank, ())]
    message = flat[0] if len(flat) == 1 else torch.cat(flat) if flat else like.new_empty(0)
    given = [sum(part.numel() for part in send.get(rank, ())) for rank in ranks]
    expected = [sizes.get(rank, 0) for rank in ranks]
    arrived = like.new_empty(sum(expected))
    return arrived, dist.all_to_all_single(arrived, message, expected, given, group=group, async_op=True)
