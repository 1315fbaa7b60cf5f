"""The decoding cache of all layers; :mod:`fusiontree.models.mixers.cache` has the cache of one mixer.

Each row of a batch counts positions separately: prompts of different length are padded on the left.

A cache can be fixed (:meth:`DecodeCache.fix`): from then on no tensor is reallocated, and each step of one token per
row updates the tensors in place at indices that the device counts. Such a step can be recorded once and replayed
(:mod:`fusiontree.models.cuda_graph`).

Shape legend: B rows, S new tokens; a number is an axis of that size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fusiontree.models.config import ModelConfig
from fusiontree.models.mixers import layer_mixers
from fusiontree.models.mixers.cache import LayerCache, MixerCache


class DecodeCache:
    """The model's cache for a batch of texts; :meth:`FusionTreeModel.new_cache` creates it, each forward updates it."""

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        max_length: int | None,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """Create an empty cache; :meth:`FusionTreeModel.new_cache` describes the arguments."""
        capacity = max_length or 0
        self.positions_B = torch.zeros(rows, dtype=torch.int64, device=device)
        """Position of each row's next token, which is the number of tokens in its text."""
        self.lengths = [0] * rows
        """``positions_B`` on the host."""
        self.columns = 0
        """Columns of the batch of texts: tokens of the longest text, pads on the left included."""
        self.fixed_columns: int | None = None
        """Maximum of ``columns``; None as long as the cache is not fixed."""
        self.column_1: Tensor | None = None
        """``columns`` on the device, once the cache is fixed."""
        self.layers: list[LayerCache] = [
            {
                m.module_name: m.new_cache(config.of_layer(layer), layer, capacity, dtype)
                for m in layer_mixers(config, layer)
            }
            for layer in range(config.num_layers)
        ]

    @property
    def rows(self) -> int:
        """Number of texts in the batch."""
        return len(self.lengths)

    @property
    def is_empty(self) -> bool:
        """True before the first forward."""
        return not any(self.lengths)

    def next_positions_BS(self, length: int) -> Tensor:
        """Return the positions of ``length`` tokens that continue every row's text."""
        return self.positions_B[:, None] + torch.arange(length, device=self.positions_B.device)

    def check_room(self, length: int) -> None:
        """Check that ``length`` tokens per row fit; a cache that is not fixed has no limit.

        Raises:
            ValueError: the cache is fixed, and ``length`` is more than one or no column is left.
        """
        if self.fixed_columns is None:
            return
        if length != 1:
            raise ValueError(f"a fixed cache takes one token per row and step, not {length}")
        if self.columns + 1 > self.fixed_columns:
            raise ValueError(f"the cache was fixed for {self.fixed_columns} tokens and is full; fix it for more")

    def advance(self, counts: Sequence[int], columns: int) -> None:
        """Record that row i's text grew by ``counts[i]`` tokens, in ``columns`` new columns."""
        if self.column_1 is not None:  # a recorded step must update these two tensors on the device
            self.positions_B.add_(1)
            self.column_1.add_(1)
        elif min(counts) == max(counts):
            self.positions_B = self.positions_B + counts[0]
        else:
            self.positions_B = self.positions_B + torch.tensor(counts, device=self.positions_B.device)
        self.count(counts, columns)

    def count(self, counts: Sequence[int], columns: int) -> None:
        """Update the host's counters as :meth:`advance` does, for tokens that the device has counted already."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self.columns += columns

    def fix(self, columns: int) -> None:
        """Allocate room for ``columns`` tokens per row, pads included, and never reallocate a tensor afterwards.

        After this, each forward must continue every row by exactly one token. May be called again with more columns,
        which allocates new tensors.

        Raises:
            ValueError: the cache is empty, or already holds more than ``columns`` columns.
        """
        if self.is_empty:
            raise ValueError("the cache is empty; fix it after the forward that fills it")
        if columns < self.columns:
            raise ValueError(f"the cache holds {self.columns} columns and cannot be fixed at {columns}")
        for layer in self.layers:
            for cache in layer.values():
                cache.fix(columns)
        self.fixed_columns = columns
        self.column_1 = torch.full((1,), self.columns, dtype=torch.int64, device=self.positions_B.device)

    def rehearsal(self) -> DecodeCache:
        """Return a fixed cache for one trial step that changes nothing that later steps read.

        The returned cache has separate counters; see :meth:`MixerCache.rehearsal` for the caches of the layers.
        """
        assert self.fixed_columns is not None, "a trial step needs a fixed cache"
        return self._copy(self.lengths, Tensor.clone, lambda cache: cache.rehearsal())

    def select(self, rows: Tensor | Sequence[int]) -> DecodeCache:
        """Return a cache with the given rows in the given order; rows may be repeated or omitted."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.positions_B.device)

        def pick(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, index)

        lengths = [self.lengths[row] for row in index.tolist()]
        return self._copy(lengths, pick, lambda cache: cache.map(pick))

    @classmethod
    def join(cls, caches: Sequence[DecodeCache]) -> DecodeCache:
        """Return a cache with the rows of all ``caches``, which are filled and not fixed; texts end in one column."""
        first, *others = caches
        assert all(cache.fixed_columns is None and not cache.is_empty for cache in caches), (
            "join filled, unfixed caches"
        )
        joined = cls.__new__(cls)
        joined.positions_B = torch.cat([cache.positions_B for cache in caches])
        joined.lengths = [length for cache in caches for length in cache.lengths]
        joined.columns, joined.fixed_columns, joined.column_1 = max(cache.columns for cache in caches), None, None
        joined.layers = [
            {name: kept.join([other.layers[layer][name] for other in others]) for name, kept in mixers.items()}
            for layer, mixers in enumerate(first.layers)
        ]
        return joined

    def _copy(
        self,
        lengths: list[int],
        change: Callable[[Tensor], Tensor],
        change_cache: Callable[[MixerCache], MixerCache],
    ) -> DecodeCache:
        copy = DecodeCache.__new__(DecodeCache)
        copy.positions_B = change(self.positions_B)
        copy.lengths, copy.columns, copy.fixed_columns = lengths, self.columns, self.fixed_columns
        copy.column_1 = None if self.column_1 is None else self.column_1.clone()
        copy.layers = [{name: change_cache(cache) for name, cache in layer.items()} for layer in self.layers]
        return copy
