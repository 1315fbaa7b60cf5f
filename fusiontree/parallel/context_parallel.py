"""Context parallelism: each rank of ``cp`` holds a contiguous chunk of every sequence.

Left neighbours send the convolution its left context and the local heads the keys and values of their window. The scan
starts from the state that the previous chunks leave (one all-gather of states with their decays or matrices, of a size
that does not depend on chunk length). Global heads gather the keys and values of the full sequence. To balance causal
work (late tokens see more keys than early tokens), rank r and its mirrored rank, cp-1-r, swap half of their global
heads' queries.

Shape legend: B rows, S tokens of a chunk, T tokens of a sequence or of chunk and halo, C channels, H heads, K key/value
heads, D channels of a head, P channels and N state size of a state space head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from fusiontree.models.block import FusionBlock
from fusiontree.models.mixers.attention import AttentionCore
from fusiontree.models.model import FusionTreeModel
from fusiontree.ops.attention import attention
from fusiontree.ops.documents import Documents
from fusiontree.parallel.collectives import all_gather, reduce_scatter
from fusiontree.parallel.exchanges import begin_gather_tokens, begin_left_halos, begin_swap_with_mirror, left_halos
from fusiontree.parallel.layout import Layout

_ALIGNED = 128
"""Keys per tile of attention kernels."""


@dataclass(frozen=True)
class PieceDocuments(Documents):
    """Document boundaries of a chunk, and of the two half chunks for which this rank computes global attention."""

    own_half: Documents
    """The first half of this rank's chunk."""
    mirror_half: Documents
    """The second half of the mirrored rank's chunk."""

    @classmethod
    def from_row(cls, positions_BT: Tensor, rank: int, ranks: int) -> PieceDocuments:
        """Return this rank's boundaries from the positions of full sequences (int64 on the CPU)."""
        length = positions_BT.shape[1] // ranks
        half = first_half(length)
        begin, mirror = rank * length, (ranks - 1 - rank) * length
        return cls(
            **vars(Documents.from_positions(positions_BT[:, begin : begin + length].contiguous())),
            own_half=Documents.from_positions(positions_BT[:, begin : begin + half].contiguous()),
            mirror_half=Documents.from_positions(positions_BT[:, mirror + half : mirror + length].contiguous()),
        )

    def padded(self, count: int) -> Self:
        """Return equal boundaries whose form depends on ``count`` and the shape alone, those of both halves too."""
        halves: dict[str, Any] = {
            "own_half": self.own_half.padded(count),
            "mirror_half": self.mirror_half.padded(count),
        }
        return replace(super().padded(count), **halves)


def first_half(length: int) -> int:
    """Return the number of tokens in the first half of a chunk, rounded up."""
    return length - length // 2


class ContextParallelTools:
    """The tools that mixers ask for (:class:`fusiontree.models.mixers.base.ContextTools`)."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """``group``: the ranks that hold the chunks of the same sequences, in order."""
        self.group = group

    def state_exchange(self, reached: Tensor, decay: Tensor) -> Tensor:
        """Return the state before this rank's chunk; see :func:`pass_states`."""
        return pass_states(reached, decay, self.group)

    def affine_exchange(self, reached: Tensor, transition: Tensor) -> Tensor:
        """Return the state before this rank's chunk; see :func:`pass_affine_states`."""
        return pass_affine_states(reached, transition, self.group)

    def left_context(self, inputs: Sequence[Tensor], length: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the inputs and, for each, the ``length`` tokens before this rank's chunk."""
        return left_halos(inputs, length, group=self.group)

    def windowed_attention(self, core: AttentionCore) -> AttentionCore:
        """Return a core that receives the keys and values of the window before this rank's chunk."""
        return LocalAttentionCP(core, self.group)

    def full_attention(self, core: AttentionCore) -> AttentionCore:
        """Return a core that gathers the keys and values of the full sequence."""
        return GlobalAttentionCP(core, self.group)


def pass_states(reached: Tensor, decay: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the state before this rank's chunk, H_r, by the recurrence ``H_{r+1} = P_r H_r + S_r``.

    Args:
        reached: state after this chunk if it starts from zero, S_r: ``[B, H, …]``.
        decay: decay of the initial state over this chunk, P_r, with leading axes of ``reached`` (per head ``[B, H]``,
            per row of the state ``[B, H, N]``); 0 where a document starts in the chunk.
        group: the ranks that hold the chunks of the same sequences, in order.
    """
    return _PassStates.apply(reached, decay, group)


class _PassStates(torch.autograd.Function):
    """All-gathers states and decays in one message; each rank then accumulates the states of the previous chunks."""

    @staticmethod
    def forward(ctx: Any, reached: Tensor, decay: Tensor, group: dist.ProcessGroup) -> Tensor:
        packed = torch.cat([reached.flatten(decay.ndim), decay.unsqueeze(-1)], dim=-1)
        before = all_gather(packed, group)[: dist.get_rank(group)]
        states: list[Tensor] = []  # after each previous chunk
        for piece in before.unbind(0):
            state, kept = piece[..., :-1], piece[..., -1:]
            states.append(torch.addcmul(state, kept, states[-1]) if states else state)
        ctx.save_for_backward(before, *states)
        ctx.group, ctx.shape, ctx.lead = group, reached.shape, decay.ndim
        return states[-1].reshape(ctx.shape) if states else torch.zeros_like(reached)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        before, *states = ctx.saved_tensors
        dstate = grads[0].flatten(ctx.lead)
        # Every rank takes part in the reduce-scatter, also the first, which adds only zeros.
        dpacked = dstate.new_zeros(dist.get_world_size(ctx.group), *dstate.shape[:-1], dstate.shape[-1] + 1)
        for index in reversed(range(len(states))):
            dpacked[index, ..., :-1] = dstate
            if index:
                dpacked[index, ..., -1] = (dstate * states[index - 1]).sum(-1)
                dstate = dstate * before[index, ..., -1:]
        mine = reduce_scatter(dpacked, ctx.group)
        return mine[..., :-1].reshape(ctx.shape), mine[..., -1], None


def pass_affine_states(reached: Tensor, transition: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the state before this rank's chunk, H_r, by the recurrence ``H_{r+1} = P_r @ H_r + S_r``.

    Args:
        reached: state after this chunk if it starts from zero, S_r: ``[B, H, K, V]``, in fp32 or better.
        transition: matrix that multiplies the initial state over this chunk, P_r: ``[B, H, K, K]``; 0 where a document
            starts in the chunk.
        group: the ranks that hold the chunks of the same sequences, in order.
    """
    return _PassAffineStates.apply(reached, transition, group)


class _PassAffineStates(torch.autograd.Function):
    """As :class:`_PassStates`, with a matrix in place of the decay."""

    @staticmethod
    def forward(ctx: Any, reached: Tensor, transition: Tensor, group: dist.ProcessGroup) -> Tensor:
        width = reached.shape[-1]
        before = all_gather(torch.cat([reached, transition], dim=-1), group)[: dist.get_rank(group)]
        states: list[Tensor] = []  # after each previous chunk
        for piece in before.unbind(0):
            state, matrix = piece[..., :width], piece[..., width:]
            states.append(state + matrix @ states[-1] if states else state)
        ctx.save_for_backward(before, *states)
        ctx.group, ctx.width = group, width
        return states[-1].clone() if states else torch.zeros_like(reached)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        before, *states = ctx.saved_tensors
        width, (dstate,) = ctx.width, grads
        # Every rank takes part in the reduce-scatter, also the first, which adds only zeros.
        dpacked = dstate.new_zeros(dist.get_world_size(ctx.group), *dstate.shape[:-1], before.shape[-1])
        for index in reversed(range(len(states))):
            dpacked[index, ..., :width] = dstate
            if index:
                dpacked[index, ..., width:] = dstate @ states[index - 1].transpose(-1, -2)
                dstate = before[index, ..., width:].transpose(-1, -2) @ dstate
        mine = reduce_scatter(dpacked, ctx.group)
        return mine[..., :width], mine[..., width:], None


class _ChunkAttention(AttentionCore):
    """An attention core that communicates with the ranks that hold the other chunks of the sequences."""

    def __init__(self, core: AttentionCore, group: dist.ProcessGroup) -> None:
        super().__init__(core.window, core.backend)
        self.group = group


class LocalAttentionCP(_ChunkAttention):
    """Attention of the local heads: left neighbours send the window's keys and values that precede the chunk."""

    def begin(
        self, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, documents: Documents | None
    ) -> Callable[[], Tensor]:
        """Start to receive the neighbours' keys and values; the returned function computes attention."""
        assert self.window is not None and documents is not None
        length = self.window - 1
        if length > _ALIGNED:  # kernels read full tiles of keys; the mask excludes the surplus
            length = -(-length // _ALIGNED) * _ALIGNED
        length = min(length, q_BSHD.shape[1] * (dist.get_world_size(self.group) - 1))
        attend = partial(attention, window=self.window, documents=documents, backend=self.backend)
        if not length:
            return partial(attend, q_BSHD, k_BSKD, v_BSKD)
        (kv_BSKD,), before = begin_left_halos((torch.cat([k_BSKD, v_BSKD], dim=-1),), length, self.group)

        def finish() -> Tensor:
            kv_BTKD = torch.cat([*before(), kv_BSKD], dim=1)
            return attend(q_BSHD, *kv_BTKD.chunk(2, dim=-1))

        return finish


class GlobalAttentionCP(_ChunkAttention):
    """Attention of the global heads: keys and values of the full sequence, queries of two mirrored half chunks."""

    def begin(
        self, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, documents: Documents | None
    ) -> Callable[[], Tensor]:
        """Start to receive the sequence's keys and values and the mirrored rank's queries."""
        assert isinstance(documents, PieceDocuments)
        own_documents, mirror_documents = documents.own_half, documents.mirror_half
        rank, ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        length = q_BSHD.shape[1]
        half = first_half(length)
        gathered = begin_gather_tokens(torch.cat([k_BSKD, v_BSKD], dim=-1), self.group)
        first, second = q_BSHD.split([half, length - half], dim=1)
        # A chunk of one token has no second half.
        mirrored = begin_swap_with_mirror(second, self.group) if half < length else None
        attend = partial(attention, backend=self.backend)

        def finish() -> Tensor:
            ends = (rank * length + half, (ranks - rank) * length)
            k_own, v_own, k_mirror, v_mirror = _KeysUpTo.apply(gathered(), *ends)
            theirs = None
            if mirrored is not None:  # first, so that sending these results overlaps the computation below
                mirror = attend(mirrored(), k_mirror, v_mirror, documents=mirror_documents)
                theirs = begin_swap_with_mirror(mirror, self.group)
            own = attend(first, k_own, v_own, documents=own_documents)
            return own if theirs is None else torch.cat([own, theirs()], dim=1)

        return finish


class _KeysUpTo(torch.autograd.Function):
    """Returns keys and values ``[B, end, K, D]`` of the first ``end`` tokens of a sequence, for two values of ``end``.

    ``kv_BTKD`` concatenates keys and values along the last axis. The backward copies the longer gradient into the
    sequence's gradient and adds the shorter gradient in place.
    """

    @staticmethod
    def forward(ctx: Any, kv_BTKD: Tensor, *ends: int) -> tuple[Tensor, ...]:
        ctx.shape, ctx.ends = kv_BTKD.shape, ends
        return tuple(part for end in ends for part in kv_BTKD[:, :end].chunk(2, dim=-1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (short, dshort), (long, dlong) = sorted(zip(ctx.ends, (grads[:2], grads[2:]), strict=True), key=itemgetter(0))
        total = grads[0].new_empty(ctx.shape)
        total[:, long:].zero_()
        for part, first, second in zip(total.chunk(2, dim=-1), dlong, dshort, strict=True):
            part[:, :long] = first
            part[:, :short].add_(second)
        return total, None, None


def apply_context_parallel(model: FusionTreeModel, layout: Layout) -> None:
    """Give every mixer the tools to compute a chunk of a sequence.

    Parameter names do not change. With cp = 1 the model does not change.
    """
    if layout.cp_size == 1:
        return
    tools = ContextParallelTools(layout.cp_group)
    for block in model.layers:
        assert isinstance(block, FusionBlock)
        for mixer in block.mixers().values():
            mixer.use_context_parallel(tools)
