"""What a CUDA graph does to a step, on the CPU: operations are recorded once and replayed on the same tensors.

Shape legend: B rows, S tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What a capture refuses: reading a value on the host, and bringing one from it.
_FORBIDDEN = {"_local_scalar_dense", "item", "lift_fresh", "nonzero", "is_nonzero", "equal"}


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in _FORBIDDEN, f"{name} cannot be part of a graph"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class RecordedStep:
    """The interface of :class:`fusiontree.models.graphs.GraphedStep`, without a GPU."""

    made = 0

    def __init__(self, model: Any, cache: Any) -> None:
        type(self).made += 1
        assert cache.fixed_columns is not None
        self.cache = cache
        self._tokens_B1 = torch.zeros(cache.rows, 1, dtype=torch.int64)
        self._model = model
        model(self._tokens_B1, cache=cache.rehearsal())
        lengths, columns = cache.lengths, cache.columns
        # A capture computes nothing, so what the recording changes is put back.
        kept = [(tensor, tensor.clone()) for tensor in tensors_of(cache)]
        with _Recorder() as recorder:
            self._logits_BSV = model(self._tokens_B1, cache=cache).logits_BSV
        for tensor, before in kept:
            tensor.copy_(before)
        cache.lengths, cache.columns = lengths, columns
        self._calls = recorder.calls

    def __call__(self, tokens_B1: torch.Tensor) -> torch.Tensor:
        self.cache.check_room(1)
        assert tokens_B1.shape == self._tokens_B1.shape
        self._tokens_B1.copy_(tokens_B1)
        for func, args, kwargs, recorded in self._calls:
            inputs = {_place(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(recorded), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and _place(old) not in inputs:
                    old.copy_(new)
        self.cache.count([1] * self.cache.rows, 1)
        return self._logits_BSV[:, -1]


def tensors_of(cache: Any) -> list[torch.Tensor]:
    """Every tensor of a fixed cache."""
    found = [cache.positions_B, cache.column_1]
    for layer in cache.layers:
        if layer.mamba:
            found += layer.mamba.before()
        if layer.attention:
            for part in (layer.attention.local._kept, layer.attention.everything._buffer):
                found += list(part or ())
    return found


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
