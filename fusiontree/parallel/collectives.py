"""Differentiable collectives: each forward has its dual as backward.

:mod:`fusiontree.parallel.exchanges` has those that overlap computation.

Every rank of a group calls these functions in the same order, forward and backward. A result that a rank does not need
must still be part of its graph (times zero); otherwise its peers would wait for it in the backward pass.

Shape legend: B rows, S tokens of a rank, axes after them are free. R ranks of the group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Names in torch 2.13, which warns about the older names.
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


def scatter_tokens(x_BS: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Reduce-scatter tokens, ``[B, R*S, …]`` to ``[B, S, …]``; the backward all-gathers the gradient."""
    return _ScatterTokens.apply(x_BS, group)


def sum_identity(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-reduce in the forward, identity in the backward.

    Use it when every rank computes the same loss from the sum but only one loss is counted: each rank's addend then
    gets the gradient exactly once.
    """
    return _SumIdentity.apply(x, group)


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


def join_tokens(stacked_RBS: Tensor) -> Tensor:
    """``[R, B, S, …]`` to ``[B, R*S, …]``; no copy for one row."""
    return stacked_RBS.movedim(0, 1).flatten(1, 2)


def part_tokens(x_BS: Tensor, ranks: int) -> Tensor:
    """``[B, R*S, …]`` to ``[R, B, S, …]``."""
    return x_BS.unflatten(1, (ranks, -1)).movedim(1, 0)


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BS: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter(part_tokens(x_BS, dist.get_world_size(group)), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return join_tokens(all_gather(grads[0], ctx.group)), None


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
