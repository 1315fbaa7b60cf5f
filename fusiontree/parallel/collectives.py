"""Exchanges between ranks that gradients pass through: each forward with its dual backward.

Every rank of a group calls these in the same order, forward and backward. A result that a rank does not need must still
be part of its graph (times zero), or its backward would leave the peers waiting.

Shape legend: B rows, S tokens of a rank, axes after them are free. R ranks of the group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Their names in torch 2.13, which warns of the older ones.
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


def gather_tokens(x_BS: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Put the ranks' tokens together, ``[B, S, …]`` to ``[B, R*S, …]``; the backward reduce-scatters the gradient."""
    return _GatherTokens.apply(x_BS, group)


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
        length: tokens wanted.
        group: ranks whose pieces make up the rows, in order.
    """
    outputs = _LeftHalos.apply(length, group, *pieces)
    return outputs[: len(pieces)], outputs[len(pieces) :]


def swap_with_mirror(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Exchange a tensor of equal shape with rank R-1-r; the backward exchanges the gradients."""
    return _Swap.apply(x, group)


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


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BS: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _join(_all_gather(x_BS, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(_part(grads[0], dist.get_world_size(ctx.group)), ctx.group), None


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


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _swap(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _swap(grads[0], ctx.group), None


def _swap(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    mirror = dist.get_world_size(group) - 1 - dist.get_rank(group)
    return _exchange({mirror: x}, {mirror: tuple(x.shape)}, x, group)[mirror]


class _LeftHalos(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, length: int, group: dist.ProcessGroup, *pieces: Tensor) -> tuple[Tensor, ...]:
        ctx.length, ctx.group = length, group
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        rows, size = pieces[0].shape[:2]
        counts = _halo_counts(length, size)
        last_BSC = torch.cat([piece[:, size - counts[0] :].flatten(2) for piece in pieces], dim=-1)
        send, receive = {}, {}
        for back, count in enumerate(counts, start=1):
            if rank + back < ranks:
                send[rank + back] = last_BSC[:, counts[0] - count :]
            if rank - back >= 0:
                receive[rank - back] = (rows, count, last_BSC.shape[2])
        received = _exchange(send, receive, last_BSC, group)
        # From the farthest neighbour to the nearest, and zeros for those that do not exist.
        parts = [
            received.get(rank - back, last_BSC.new_zeros(rows, count, last_BSC.shape[2]))
            for back, count in enumerate(counts, start=1)
        ]
        halos = torch.cat(parts[::-1], dim=1).split([piece[0, 0].numel() for piece in pieces], dim=-1)
        views = [piece.view_as(piece) for piece in pieces]
        return *views, *(h.contiguous().view(rows, length, *p.shape[2:]) for h, p in zip(halos, pieces, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        of_pieces, of_halos = grads[: len(grads) // 2], grads[len(grads) // 2 :]
        rank, ranks = dist.get_rank(ctx.group), dist.get_world_size(ctx.group)
        rows, size = of_pieces[0].shape[:2]
        counts = _halo_counts(ctx.length, size)
        grad_BSC = torch.cat([grad.flatten(2) for grad in of_halos], dim=-1)
        send, receive = {}, {}
        end = ctx.length
        for back, count in enumerate(counts, start=1):
            if rank - back >= 0:
                send[rank - back] = grad_BSC[:, end - count : end]
            if rank + back < ranks:
                receive[rank + back] = (rows, count, grad_BSC.shape[2])
            end -= count
        received = _exchange(send, receive, grad_BSC, ctx.group)
        results = []
        widths = [grad[0, 0].numel() for grad in of_pieces]
        for index, grad in enumerate(of_pieces):
            total = grad.contiguous()  # an expanded one could not be added to
            for values in received.values():
                part = values.split(widths, dim=-1)[index]
                total[:, size - values.shape[1] :] += part.reshape(rows, values.shape[1], *total.shape[2:])
            results.append(total)
        return None, None, *results


def _halo_counts(length: int, piece: int) -> list[int]:
    """Tokens of a halo that each left neighbour holds, the nearest first."""
    return [min(piece, length - begin) for begin in range(0, length, piece)]


def _exchange(
    send: dict[int, Tensor], receive: dict[int, tuple[int, ...]], like: Tensor, group: dist.ProcessGroup
) -> dict[int, Tensor]:
    """Send tensors to ranks of the group and return what they sent, of the given shapes; all ranks call this together.

    One call of the library, where pairs of sends and receives would cost the host several.
    """
    ranks = range(dist.get_world_size(group))
    flat = [send[rank].reshape(-1) if rank in send else like.new_empty(0) for rank in ranks]
    sizes = [math.prod(receive[rank]) if rank in receive else 0 for rank in ranks]
    arrived = like.new_empty(sum(sizes))
    sent = flat[0] if len(flat) == 1 else torch.cat(flat)
    dist.all_to_all_single(arrived, sent, sizes, [part.numel() for part in flat], group=group)
    parts = arrived.split(sizes)
    return {rank: parts[rank].view(shape) for rank, shape in receive.items()}
