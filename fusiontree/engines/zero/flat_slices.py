"""Positions of parameters in DeepSpeed's flat partitions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from fusiontree.engines.parameters.flat_slice import FlatSlice, slice_between


def stage3_slices(optimizer: Any, names: dict[nn.Parameter, str]) -> Iterator[FlatSlice]:
    """Yield this rank's slices under ZeRO-3, which shards each parameter separately and pads the last rank's shard."""
    for group, parameters in enumerate(optimizer.fp16_groups):
        offset = 0
        for parameter in parameters:
            size = parameter.partition_numel()
            start = size * parameter.ds_zero_partition_rank
            length = min(max(parameter.ds_numel - start, 0), size)
            yield FlatSlice(names[parameter], group, offset, start if length else 0, length)
            offset += size


def stage12_slices(optimizer: Any, names: dict[nn.Parameter, str], rank: int) -> Iterator[FlatSlice]:
    """Yield this rank's slices under ZeRO-1 and 2, which shard the concatenation of a group's parameters.

    Args:
        optimizer: DeepSpeed's.
        names: of the parameters.
        rank: of this process among the ranks that the group is sharded over.
    """
    for group, parameters in enumerate(optimizer.round_robin_bit16_groups):
        begin = rank * optimizer.partition_size[group]
        end = begin + optimizer.partition_size[group]
        for parameter, first in zip(parameters, optimizer.round_robin_bit16_offsets[group], strict=True):
            yield slice_between(begin, end, names[parameter], group, first, parameter.numel())
