"""Mistakes that a layout could make, each to be seen by the parity table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from fusiontree.engines.parameters.flat_buffer import FlatBuffer
from fusiontree.engines.zero.engine import ZeroEngine
from fusiontree.ops.documents import Documents
from fusiontree.parallel import context_parallel
from fusiontree.parallel.context_parallel import ContextParallelTools
from fusiontree.parallel.layout import Layout
from fusiontree.parallel.shard_groups import ShardGroup
from tests.parallel.table import Cell


class Mutation(NamedTuple):
    """A mistake, and a cell of the table that it must break."""

    cell: Cell
    owner: Any
    attribute: str
    make: Callable[[Any], Any]
    """Makes the mistaken attribute from the right one."""


@contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """Make the named mistake; None makes none."""
    if name is None:
        yield
        return
    mutation = (MUTATIONS | OF_GATED_DELTA_NET)[name]
    right = getattr(mutation.owner, mutation.attribute)
    with patch.object(mutation.owner, mutation.attribute, mutation.make(right)):
        yield


def _not_summed(right: Callable) -> Callable:
    return lambda self, square: square


def _no_sum_over_tp(right: Callable) -> Callable:
    return lambda self, shard, tp_split=False: right(self, shard, True)


def _border_start_forgotten(right: Any) -> Any:
    def from_positions(positions_BS: Tensor) -> Documents:
        documents = right(positions_BS)
        # A document that starts with the piece is taken for the one before it.
        return replace(documents, segments_BS=documents.segments_BS - (positions_BS[:, :1] == 0).int())

    return staticmethod(from_positions)


def _passes_documents(right: Callable) -> Callable:
    return lambda self, reached, decay: right(self, reached, torch.ones_like(decay))


def _state_not_passed(right: Callable) -> Callable:
    return lambda self, reached, decay: right(self, reached, decay) * 0.0


def _passes_all(right: Callable) -> Callable:
    def affine_exchange(self: ContextParallelTools, reached: Tensor, transition: Tensor) -> Tensor:
        identity = torch.eye(transition.shape[-1], dtype=transition.dtype)
        return right(self, reached, transition * 0.0 + identity)

    return affine_exchange


def _transposed(right: Callable) -> Callable:
    return lambda self, reached, transition: right(self, reached, transition.transpose(-1, -2))


def _affine_state_not_passed(right: Callable) -> Callable:
    return lambda self, reached, transition: right(self, reached, transition) * 0.0


def _halo_token_lost(right: Callable) -> Callable:
    def left_halos(pieces: Sequence[Tensor], length: int, group: dist.ProcessGroup) -> Any:
        pieces, halos = right(pieces, length, group)
        return pieces, [torch.cat([halo_BS[:, :1] * 0.0, halo_BS[:, 1:]], dim=1) for halo_BS in halos]

    return left_halos


def _window_key_lost(right: Callable) -> Callable:
    def begin_left_halos(pieces: Sequence[Tensor], length: int, group: dist.ProcessGroup) -> Any:
        pieces, arrive = right(pieces, length, group)

        def lost() -> list[Tensor]:
            # The nearest token: of the farthest, tiles of keys bring more than the window shows.
            return [torch.cat([halo_BS[:, :-1], halo_BS[:, -1:] * 0.0], dim=1) for halo_BS in arrive()]

        return pieces, lost

    return begin_left_halos


def _mean_gradient(right: Callable) -> Callable:
    return lambda self, factor: right(self, 2.0 * factor)


def _halved_sums(right: Callable) -> Callable:
    def land(self: FlatBuffer) -> None:
        right(self)
        if self.gradient is not None:
            self.gradient.mul_(0.5)

    return land


def _without_tags(right: Callable) -> Callable:
    def partition(self: ZeroEngine, unit: ShardGroup, config: dict[str, Any]) -> None:
        for _, parameter in unit.named_parameters():
            parameter.__dict__.pop("tensor_model_parallel", None)
        right(self, unit, config)

    return partition


def _left_out(right: Callable) -> Callable:
    return lambda self: None


CP2, CP4, TP2 = Cell("fsdp2", 1, 2, 1), Cell("fsdp2", 1, 4, 1), Cell("fsdp2", 1, 1, 2)
MUTATIONS: dict[str, Mutation] = {
    "no gradient sum of sequence parallel weights": Mutation(TP2, Layout, "parameter_mesh", _no_sum_over_tp),
    "no document reset at a border": Mutation(CP4, Documents, "from_positions", _border_start_forgotten),
    "state passes over documents": Mutation(CP4, ContextParallelTools, "state_exchange", _passes_documents),
    "state not passed": Mutation(CP2, ContextParallelTools, "state_exchange", _state_not_passed),
    "one halo token lost": Mutation(CP2, context_parallel, "left_halos", _halo_token_lost),
    "one key of the window lost": Mutation(CP2, context_parallel, "begin_left_halos", _window_key_lost),
    "gradient averaged": Mutation(CP2, FSDPModule, "set_gradient_divide_factor", _mean_gradient),
    "gradient averaged (ddp)": Mutation(Cell("ddp", 1, 2, 1), FlatBuffer, "land", _halved_sums),
    "norm of one rank's part (ddp)": Mutation(Cell("ddp", 1, 1, 2), Layout, "sum_over_shards", _not_summed),
    "tp tag removed (zero3)": Mutation(Cell("zero3", 1, 1, 2), ZeroEngine, "_partition", _without_tags),
    "gradient averaged (zero3)": Mutation(Cell("zero3", 1, 2, 1), ZeroEngine, "_sum_gradients", _left_out),
    "no gradient sum over tp (zero1)": Mutation(Cell("zero1", 1, 1, 2), ZeroEngine, "_sum_over_tp", _left_out),
}
OF_GATED_DELTA_NET: dict[str, Mutation] = {
    "affine state not passed": Mutation(CP2, ContextParallelTools, "affine_exchange", _affine_state_not_passed),
    "affine state passes over documents": Mutation(CP4, ContextParallelTools, "affine_exchange", _passes_all),
    "matrix of a chunk transposed": Mutation(CP4, ContextParallelTools, "affine_exchange", _transposed),
}
"""Mistakes in passing the state of Gated DeltaNet."""
