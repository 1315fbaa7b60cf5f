"""Differentiable collectives: each forward has its dual as backward.

Functions ``begin_*`` start an exchange and return a function that waits for it, so that communication overlaps
computation. The backward pass starts the dual exchange where the forward waited, and waits where the forward started.

Every rank of a group calls these functions in the same order, forward and backward. A result that a rank does not need
must still be part of its graph (times zero); otherwise its peers would wait for it in the backward pass.

Shape legend: B rows, S tokens of a rank, axes after them are free. R ranks of the group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# Names in torch 2.13, which warns about the older names.
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


def gather_tokens(x_BS: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-gather tokens, ``[B, S, …]`` to ``[B, R*S, …]``; the backward reduce-scatters the gradient."""
    return begin_gather_tokens(x_BS, group)()


def begin_gather_tokens(x_BS: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Start :func:`gather_tokens`; call the returned function to wait for the result."""
    _, arrive = _begin(_GatherTokens(group), x_BS)
    return lambda: arrive()[0]


def scatter_tokens(x_BS: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Reduce-scatter tokens, ``[B, R*S, …]`` to ``[B, S, …]``; the backward all-gathers the gradient."""
    return _ScatterTokens.apply(x_BS, group)


def sum_identity(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-reduce in the forward, identity in the backward.

    Use it when every rank computes the same loss from the sum but only one loss is counted: each rank's addend then
    gets the gradient exactly once.
    """
    return _SumIdentity.apply(x, group)


def left_halos(
    pieces: Sequence[Tensor], length: int, group: dist.ProcessGroup
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return this rank's chunks and, for each chunk, the ``length`` tokens before it (its left halo).

    Use the returned chunks instead of the given ones: they carry the gradient. Tokens before the start of the sequence
    are zeros. The halo may span several left neighbours; one message carries the tokens of all chunks. The backward
    sends the gradients of halos back and adds them in place to those of the last tokens of the chunks: adding tensors
    of full chunks would cost more than the message.

    Args:
        pieces: this rank's chunks, ``[B, S, …]``, all of one dtype.
        length: tokens of the halo, at least 1.
        group: ranks that hold the chunks of the same sequences, in order.
    """
    same, arrive = begin_left_halos(pieces, length, group)
    return same, arrive()


def begin_left_halos(
    pieces: Sequence[Tensor], length: int, group: dist.ProcessGroup
) -> tuple[tuple[Tensor, ...], Callable[[], tuple[Tensor, ...]]]:
    """Start :func:`left_halos`; return the chunks to use from here on and a function that waits for the halos."""
    return _begin(_LeftHalos(length, group, [tuple(p.shape) for p in pieces]), *pieces)


def begin_swap_with_mirror(x: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Start to exchange tensors of equal shape with the mirrored rank, R-1-r; the backward exchanges the gradients.

    Call the returned function to wait for the other tensor.
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
    """One exchange: how to send and how to receive, forward and backward.

    ``send`` and ``send_back`` start the exchange; the tensor they return is filled when the returned work is done.
    """

    def send(self, *inputs: Tensor) -> tuple[Tensor, dist.Work]: ...

    def land(self, arrived: Tensor) -> tuple[Tensor, ...]: ...

    def send_back(self, *grads: Tensor) -> tuple[Tensor, dist.Work]: ...

    def land_back(self, arrived: Tensor, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the gradients of the inputs; ``grads`` come from the uses of the inputs that ``send`` passed on."""
        ...

    passes: bool
    """True if the exchange returns its inputs for further use."""


class _Flight:
    """An exchange with its pending forward and backward work."""

    def __init__(self, exchange: _Exchange) -> None:
        self.exchange = exchange
        self.work: dist.Work | None = None
        self.back: tuple[Tensor, dist.Work] | None = None


def _begin(exchange: _Exchange, *inputs: Tensor) -> tuple[tuple[Tensor, ...], Callable[[], tuple[Tensor, ...]]]:
    """Start an exchange; return its inputs, where it passes them on, and a function that waits for the results."""
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
        assert ctx.flight.back is not None, "the forward pass started this exchange and never waited for it"
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
        # The gradient is still in flight; autograd needs a placeholder here, which _Begin.backward ignores.
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
    """Left halos. A message concatenates the chunks' tokens, flat: if one neighbour holds the halo, none is copied."""

    passes = True

    def __init__(self, length: int, group: dist.ProcessGroup, shapes: list[tuple[int, ...]]) -> None:
        self.length, self.group, self.shapes = length, group, shapes
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.rows, self.size = shapes[0][:2]
        self.widths = [math.prod(shape[2:]) for shape in shapes]
        counts = enumerate(_halo_counts(length, self.size), start=1)
        self.left, self.right = {}, {}  # tokens of a halo, by the rank that sends or receives them
        for back, count in counts:
            if self.rank - back >= 0:
                self.left[self.rank - back] = count
            if self.rank + back < self.ranks:
                self.right[self.rank + back] = count

    def send(self, *inputs: Tensor) -> tuple[Tensor, dist.Work]:
        send = {rank: [piece[:, self.size - count :] for piece in inputs] for rank, count in self.right.items()}
        return _exchange(send, self._sizes(self.left), inputs[0], self.group)

    def land(self, arrived: Tensor) -> tuple[Tensor, ...]:
        # The farthest neighbour first; zeros for neighbours that do not exist.
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
        totals = tuple(grad.contiguous() for grad in grads)  # an expanded gradient cannot be added to in place
        for part, count in self._parts(arrived, self.right):
            for total, own in zip(totals, self._pieces(part, count), strict=True):
                total[:, self.size - count :].add_(own)  # += would copy the slice onto itself
        return totals

    def _sizes(self, counts: dict[int, int]) -> dict[int, int]:
        return {rank: self.rows * count * sum(self.widths) for rank, count in counts.items()}

    def _parts(self, arrived: Tensor, counts: dict[int, int]) -> list[tuple[Tensor, int]]:
        """Split the received buffer into one message per rank, in rank order, each with its number of tokens."""
        sizes = self._sizes(counts)
        ranks = sorted(counts)
        return list(zip(arrived.split([sizes[rank] for rank in ranks]), [counts[rank] for rank in ranks], strict=True))

    def _pieces(self, message: Tensor, count: int) -> list[Tensor]:
        """Split a message of ``count`` tokens into one tensor ``[B, count, …]`` per chunk."""
        flat = message.split([self.rows * count * width for width in self.widths])
        return [part.view(self.rows, count, *shape[2:]) for part, shape in zip(flat, self.shapes, strict=True)]


def _halo_counts(length: int, piece: int) -> list[int]:
    """Return how many tokens of a halo each left neighbour holds, the nearest first; ``piece``: tokens of a chunk."""
    return [min(piece, length - begin) for begin in range(0, length, piece)]


def _exchange(
    send: dict[int, list[Tensor]], sizes: dict[int, int], like: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, dist.Work]:
    """Start to send ``send[rank]`` to and to receive ``sizes[rank]`` elements from each rank; a collective call.

    Returns the receive buffer: one message per sending rank, in rank order, with that rank's tensors concatenated flat.
    A single all-to-all costs the host less than pairs of sends and receives.
    """
    ranks = range(dist.get_world_size(group))
    flat = [part.reshape(-1) for rank in ranks for part in send.get(rank, ())]
    message = flat[0] if len(flat) == 1 else torch.cat(flat) if flat else like.new_empty(0)
    given = [sum(part.numel() for part in send.get(rank, ())) for rank in ranks]
    expected = [sizes.get(rank, 0) for rank in ranks]
    arrived = like.new_empty(sum(expected))
    return arrived, dist.all_to_all_single(arrived, message, expected, given, group=group, async_op=True)
