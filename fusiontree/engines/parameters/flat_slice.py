"""Which elements of which parameter lie where in ZeRO's flat partitions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn


class FlatSlice(NamedTuple):
    """Consecutive elements of a parameter (of the tensor parallel rank's part of it) in a flat partition."""

    name: str
    group: int
    """Index of the flat partition."""
    offset: int
    """In the flat partition."""
    start: int
    """In the parameter, row-major."""
    length: int
    """Elements; 0 where this rank holds none of the parameter."""

    def of(self, flat: Tensor) -> Tensor:
        """Return the elements; they share memory with ``flat``."""
        return flat.narrow(0, self.offset, self.length)


def stage3_slices(optimizer: Any, names: dict[nn.Parameter, str]) -> Iterator[FlatSlice]:
    """Yield this rank's parts under ZeRO-3, which cuts each parameter by itself and pads the last rank's part."""
    for group, parameters in enumerate(optimizer.fp16_groups):
        offset = 0
        for parameter in parameters:
            size = parameter.partition_numel()
            start = size * parameter.ds_zero_partition_rank
            length = min(max(parameter.ds_numel - start, 0), size)
            yield FlatSlice(names[parameter], group, offset, start if length else 0, length)
            offset += size


def stage12_slices(optimizer: Any, names: dict[nn.Parameter, str], rank: int) -> Iterator[FlatSlice]:
    """Yield this rank's parts under ZeRO-1 and 2, which cut the concatenation of a group's parameters.

    Args:
        optimizer: DeepSpeed's.
        names: of the parameters.
        rank: place among the ranks that the group is cut over.
    """
    for group, parameters in enumerate(optimizer.round_robin_bit16_groups):
        size = optimizer.partition_size[group]
        begin, end = rank * size, (rank + 1) * size
        for parameter, first in zip(parameters, optimizer.round_robin_bit16_offsets[group], strict=True):
            low, high = max(begin, first), min(end, first + parameter.numel())
            if low < high:
                yield FlatSlice(names[parameter], group, low - begin, low - first, high - low)
            else:
                yield FlatSlice(names[parameter], group, 0, 0, 0)
