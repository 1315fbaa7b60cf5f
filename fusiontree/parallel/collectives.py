"""Exchanges between ranks that gradients pass through: each forward with its dual backward.

Every rank of a group calls these in the same order, forward and backward. A result that a rank does not need must still
be part of its graph (times zero), or its backward would leave the peers waiting.

Shape legend: B rows, S tokens of a rank, axes after them are free. R ranks of the group.
"""

from __future__ import annotations

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


def left_halo(x_BS: Tensor, length: int, group: dist.ProcessGroup) -> Tensor:
    """Return the ``length`` tokens before this rank's piece, ``[B, length, …]``; zeros before the row's start.

    They come from as many left neighbours as hold them. The backward sends their gradients back.
    """
    return _LeftHalo.apply(x_BS, length, group)


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
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    mirror = ranks - 1 - rank
    if mirror == rank:
        return x.clone()
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    _exchange({mirror: x}, {mirror: received}, group)
    return received


class _LeftHalo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BS: Tensor, length: int, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.piece = group, x_BS.shape[1]
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        counts = _halo_counts(length, ctx.piece)
        halo_BS = x_BS.new_zeros(x_BS.shape[0], length, *x_BS.shape[2:])
        send, receive = {}, {}
        for back, count in enumerate(counts, start=1):
            if rank + back < ranks:
                send[rank + back] = x_BS[:, ctx.piece - count :]
            if rank - back >= 0:
                receive[rank - back] = x_BS.new_empty(x_BS.shape[0], count, *x_BS.shape[2:])
        _exchange(send, receive, group)
        end = length
        for back, count in enumerate(counts, start=1):
            if rank - back >= 0:
                halo_BS[:, end - count : end] = receive[rank - back]
            end -= count
        return halo_BS

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad_BS,) = grads
        rank, ranks = dist.get_rank(ctx.group), dist.get_world_size(ctx.group)
        length = grad_BS.shape[1]
        counts = _halo_counts(length, ctx.piece)
        send, receive = {}, {}
        end = length
        for back, count in enumerate(counts, start=1):
            if rank - back >= 0:
                send[rank - back] = grad_BS[:, end - count : end]
            if rank + back < ranks:
                receive[rank + back] = grad_BS.new_empty(grad_BS.shape[0], count, *grad_BS.shape[2:])
            end -= count
        _exchange(send, receive, ctx.group)
        grad_x_BS = grad_BS.new_zeros(grad_BS.shape[0], ctx.piece, *grad_BS.shape[2:])
        for back, count in enumerate(counts, start=1):
            if rank + back < ranks:
                grad_x_BS[:, ctx.piece - count :] += receive[rank + back]
        return grad_x_BS, None, None


def _halo_counts(length: int, piece: int) -> list[int]:
    """Tokens of a halo that each left neighbour holds, the nearest first."""
    return [min(piece, length - begin) for begin in range(0, length, piece)]


def _exchange(send: dict[int, Tensor], receive: dict[int, Tensor], group: dist.ProcessGroup) -> None:
    """Send to and receive from ranks of the group, all at once."""
    operations = [dist.P2POp(dist.isend, x.contiguous(), group=group, group_peer=to) for to, x in send.items()]
    operations += [dist.P2POp(dist.irecv, x, group=group, group_peer=source) for source, x in receive.items()]
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
