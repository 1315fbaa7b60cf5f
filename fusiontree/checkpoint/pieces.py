"""The rectangles of a tensor that this rank holds, for every kind of tensor that engines use."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fusiontree.parallel.global_tensor import GlobalTensor, Piece


def pieces_of(tensor: Tensor) -> list[Piece]:
    """Return ``(offset in the full tensor, view of the values in use)`` of this rank's non-empty rectangles.

    Args:
        tensor: a plain tensor (replicated), a DTensor (its local shard), or a :class:`GlobalTensor`.
    """
    if isinstance(tensor, GlobalTensor):
        pieces = tensor.pieces
    elif isinstance(tensor, DTensor):
        local = tensor.to_local().detach()
        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        pieces = [(tuple(offset), local)]
    else:
        pieces = [((0,) * tensor.ndim, tensor.detach())]
    return [(offset, view) for offset, view in pieces if view.numel()]
