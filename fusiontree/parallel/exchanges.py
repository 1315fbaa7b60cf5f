"""Differentiable exchanges between ranks that overlap computation.

Functions ``begin_*`` start an exchange and return a function that waits for it. The backward pass starts the dual
exchange where the forward waited, and waits where the forward started. As for all collectives, every rank of a group
calls them in the same order, and every result must be part of the graph.

Shape legend: B rows, S tokens of a rank, axes after them are free. R ranks of the group.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusiontree.parallel.collectives import ALL_GATHER, REDUCE_SCATTER, join_tokens, part_tokens


def gather_tokens(x_BS: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-gather tokens, ``[B, S, …]`` to ``[B, R*S, …]``; the backward reduce-scatters the gradient."""
    return begin_gather_tokens(x_BS, group)()


def begin_gather_tokens(x_BS: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Start :func:`gather_tokens`; call the returned function to wait for the result."""
    _, arrive = _begin(_GatherTokens(group), x_BS)
    return lambda: arrive()[0]


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


class _Exchange(ABC):
    """One exchange: how to send and how to receive, forward and backward.

    ``send`` and ``send_back`` start the exchange; the tensor they return is filled when the returned work is done.
    """

    passes = False
    """True if the exchange returns its inputs for further use."""
    work: dist.Work | None = None
    """Pending work of the forward pass."""
    back: tuple[Tensor, dist.Work] | None = None
    """Receive buffer and pending work of the backward pass."""

    @abstractmethod
    def send(self, *inputs: Tensor) -> tuple[Tensor, dist.Work]: ...

    @abstractmethod
    def land(self, arrived: Tensor) -> tuple[Tensor, ...]: ...

    @abstractmethod
    def send_back(self, *grads: Tensor) -> tuple[Tensor, dist.Work]: ...

    @abstractmethod
    def land_back(self, arrived: Tensor, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the gradients of the inputs; ``grads`` come from the uses of the inputs that ``send`` passed on."""


def _begin(exchange: _Exchange, *inputs: Tensor) -> tuple[tuple[Tensor, ...], Callable[[], tuple[Tensor, ...]]]:
    """Start an exchange; return its inputs, where it passes them on, and a function that waits for the results."""
    *same, arriving = _Begin.apply(exchange, *inputs)
    return tuple(same), lambda: _Await.apply(exchange, arriving)


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        arriving, exchange.work = exchange.send(*inputs)
        return *(x.view_as(x) for x in inputs if exchange.passes), arriving

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        assert ctx.exchange.back is not None, "the forward pass started this exchange and never waited for it"
        arrived, work = ctx.exchange.back
        ctx.exchange.back = None
        work.wait()
        return None, *ctx.exchange.land_back(arrived, grads[:-1])


class _Await(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, arriving: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        assert exchange.work is not None
        exchange.work.wait()
        exchange.work = None
        ctx.shape = arriving.shape
        return exchange.land(arriving)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        ctx.exchange.back = ctx.exchange.send_back(*grads)
        # The gradient is still in flight; autograd needs a placeholder here, which _Begin.backward ignores.
        return None, grads[0].new_empty(1).expand(ctx.shape)


class _GatherTokens(_Exchange):
    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.ranks = group, dist.get_world_size(group)

    def send(self, *inputs: Tensor) -> tuple[Tensor, dist.Work]:
        (x_BS,) = inputs
        stacked = x_BS.new_empty(self.ranks, *x_BS.shape)
        return stacked, getattr(dist, ALL_GATHER)(
            stacked.view(-1), x_BS.contiguous().view(-1), group=self.group, async_op=True
        )

    def land(self, arrived: Tensor) -> tuple[Tensor, ...]:
        return (join_tokens(arrived),)

    def send_back(self, *grads: Tensor) -> tuple[Tensor, dist.Work]:
        stacked = part_tokens(grads[0], self.ranks)
        mine = stacked.new_empty(stacked.shape[1:])
        return mine, getattr(dist, REDUCE_SCATTER)(
            mine.view(-1), stacked.contiguous().view(-1), group=self.group, async_op=True
        )

    def land_back(self, arrived: Tensor, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arrived,)


class _Swap(_Exchange):
    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.mirror = group, dist.get_world_size(group) - 1 - dist.get_rank(group)

    def send(self, *inputs: Tensor) -> tuple[Tensor, dist.Work]:
        self.shape = tuple(inputs[0].shape)
        return _all_to_all({self.mirror: [inputs[0]]}, {self.mirror: inputs[0].numel()}, inputs[0], self.group)

    def land(self, arrived: Tensor) -> tuple[Tensor, ...]:
        return (arrived.view(self.shape),)

    def send_back(self, *grads: Tensor) -> tuple[Tensor, dist.Work]:
        return _all_to_all({self.mirror: [grads[0]]}, {self.mirror: grads[0].numel()}, grads[0], self.group)

    def land_back(self, arrived: Tensor, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arrived.view(self.shape),)


class _LeftHalos(_Exchange):
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
        return _all_to_all(send, self._sizes(self.left), inputs[0], self.group)

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
        return _all_to_all(send, self._sizes(self.right), grads[0], self.group)

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


def _all_to_all(
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
