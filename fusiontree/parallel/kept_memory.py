"""Measures the memory that a block's forward keeps for its backward pass under each mode of recomputation.

Counts the tensors that operations save for their backward pass. The count is the same on every device and does not
depend on the allocator, on streams, or on parameters that an engine gathers meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fusiontree.ops.recompute import Recomputed, kept_tensors
from fusiontree.parallel.activation_checkpointing import KeptResults


def kept_bytes(forward: Callable[..., Any], x_BSC: Tensor, *args: Any, **kwargs: Any) -> dict[str, int]:
    """Return the bytes that ``forward`` keeps under none, selective and full; runs it once per mode.

    Not counted: parameters, which the engine keeps, and tensors of the other arguments, which all layers share.
    """
    none, selective, full = (_KeptMemory(args, kwargs) for _ in range(3))
    with saved_tensors_hooks(none.save, _no_backward):
        forward(x_BSC, *args, **kwargs)
    with Recomputed(selective.save):
        forward(x_BSC, *args, **kwargs)
    results: deque[Any] = deque()
    with saved_tensors_hooks(_drop, _no_backward), KeptResults(results, replay=False):
        forward(x_BSC, *args, **kwargs)
    for tensor in (x_BSC, *_tensors_of([out for out, _ in results])):
        full.add(tensor)
    return {"none": none.release(), "selective": selective.release(), "full": full.release()}


class _KeptMemory:
    """The storages that a forward pass keeps; it holds them, so that their memory is not used again meanwhile."""

    def __init__(self, *shared: Any) -> None:
        self._shared = {_place(tensor) for tensor in _tensors_of(shared)}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def save(self, tensor: Tensor, packed: Any = None) -> None:
        """Note a tensor that an operation saves; ``packed`` is kept in its place, if given."""
        if packed is None or isinstance(packed, Tensor):
            self.add(tensor)  # not ``packed``: a detached view does not tell that it is a view of a parameter
            return
        for value in kept_tensors(packed):
            self.add(value)

    def add(self, tensor: Tensor) -> None:
        """Note a tensor that is kept."""
        base = tensor if tensor._base is None else tensor._base
        if not isinstance(base, nn.Parameter) and _place(tensor) not in self._shared:
            self._storages[_place(tensor)] = tensor.untyped_storage()

    def release(self) -> int:
        """Return the bytes, and let go of the memory: hooks and what they belong to may refer to each other."""
        nbytes = sum(storage.nbytes() for storage in self._storages.values())
        self._storages.clear()
        return nbytes


def _drop(tensor: Tensor) -> None:
    """Save nothing."""


def _no_backward(saved: Any) -> Tensor:
    raise AssertionError("a measured forward has no backward pass")


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        yield from _tensors_of(vars(value))
    elif isinstance(value, tuple | list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors_of(inner)
