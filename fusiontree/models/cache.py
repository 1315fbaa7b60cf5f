"""What decoding keeps of the tokens before, of all layers: see :mod:`fusiontree.models.layer_cache`.

Rows of a batch have positions of their own: prompts of different length are padded on the left.

A cache can be fixed (:meth:`DecodeCache.fix`): from then on every tensor stays where it is and each step, of one
token a row, changes them in place at indices that the device itself counts. Such a step can be recorded once and
replayed (:mod:`fusiontree.models.cuda_graph`).

Shape legend: B rows, S new tokens; a number is an axis of that size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fusiontree.models.config import ModelConfig
from fusiontree.models.layer_cache import AttentionCache, LayerCache, MambaCache


class DecodeCache:
    """What the model keeps of a batch of texts; :meth:`FusionTreeModel.new_cache` makes it, each forward updates it."""

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        max_length: int | None,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """Start empty.

        Args:
            config: the model's.
            rows: texts of the batch.
            max_length: expected tokens of the longest text, pads included, to make room once; longer is allowed.
            dtype: of keys and values.
            device: where the model is.
        """
        capacity = max_length or 0
        self.positions_B = torch.zeros(rows, dtype=torch.int64, device=device)
        """Position of each row's next token: how many tokens its text has."""
        self.lengths = [0] * rows
        """The same numbers on the host."""
        self.columns = 0
        """Tokens of the texts as they lie side by side, pads on the left included."""
        self.fixed_columns: int | None = None
        """How many there can be; None as long as the cache is not fixed."""
        self.column_1: Tensor | None = None
        """``columns`` on the device, once the cache is fixed."""
        self.layers = [
            LayerCache(
                MambaCache(config.mamba.d_conv - 1) if letter in "FM" else None,
                AttentionCache(config.window_of_layer(layer), capacity, dtype) if letter in "FA" else None,
            )
            for layer, letter in enumerate(config.pattern)
        ]

    @property
    def rows(self) -> int:
        """Texts of the batch."""
        return len(self.lengths)

    @property
    def is_empty(self) -> bool:
        """True before the first forward."""
        return not any(self.lengths)

    def next_positions_BS(self, length: int) -> Tensor:
        """Return the positions of ``length`` tokens that continue every row's text."""
        return self.positions_B[:, None] + torch.arange(length, device=self.positions_B.device)

    def check_room(self, length: int) -> None:
        """Refuse tokens that a fixed cache cannot take.

        Raises:
            ValueError: more than one token a row, or no column is left.
        """
        if self.fixed_columns is None:
            return
        if length != 1:
            raise ValueError(f"a fixed cache takes one token a row and step, not {length}")
        if self.columns + 1 > self.fixed_columns:
            raise ValueError(f"the cache was fixed for {self.fixed_columns} tokens and all are there; fix it for more")

    def advance(self, counts: Sequence[int], columns: int) -> None:
        """Note that every row's text became ``counts`` tokens longer, in ``columns`` columns."""
        if self.column_1 is not None:  # on the device these two change as the other tensors of a fixed cache do
            self.positions_B.add_(1)
            self.column_1.add_(1)
        elif min(counts) == max(counts):
            self.positions_B = self.positions_B + counts[0]
        else:
            self.positions_B = self.positions_B + torch.tensor(counts, device=self.positions_B.device)
        self.count(counts, columns)

    def count(self, counts: Sequence[int], columns: int) -> None:
        """Do what :meth:`advance` does on the host, for tokens that the device has counted already."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self.columns += columns

    def fix(self, columns: int) -> None:
        """Keep every tensor where it is from now on, with room for ``columns`` tokens a row, pads included.

        From now on each forward continues every row by one token. May be called again to make more room, which
        makes new tensors.

        Raises:
            ValueError: the cache is empty, or holds more than ``columns`` already.
        """
        if self.is_empty:
            raise ValueError("a cache is fixed after the forward that fills it")
        if columns < self.columns:
            raise ValueError(f"the cache holds {self.columns} columns and cannot be fixed at {columns}")
        for layer in self.layers:
            if layer.mamba:
                layer.mamba.fix()
            if layer.attention:
                layer.attention.fix(columns)
        self.fixed_columns = columns
        self.column_1 = torch.full((1,), self.columns, dtype=torch.int64, device=self.positions_B.device)

    def rehearsal(self) -> DecodeCache:
        """Return a fixed cache for one trial step, which leaves this one as it was in all that later steps read.

        It has states and counters of its own and shares keys and values: the only slots that the trial writes are
        those of the next token, which the next real step writes before it reads.
        """
        assert self.fixed_columns is not None, "only a fixed cache writes where the next step writes"
        return self._copy(self.lengths, Tensor.clone, share_keys=True)

    def select(self, rows: Tensor | Sequence[int]) -> DecodeCache:
        """Return a cache that holds the given rows in the given order; a row may be repeated or left out."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.positions_B.device)

        def pick(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, index)

        return self._copy([self.lengths[row] for row in index.tolist()], pick, share_keys=False)

    def _copy(self, lengths: list[int], change: Callable[[Tensor], Tensor], share_keys: bool) -> DecodeCache:
        copy = DecodeCache.__new__(DecodeCache)
        copy.positions_B = change(self.positions_B)
        copy.lengths, copy.columns, copy.fixed_columns = lengths, self.columns, self.fixed_columns
        copy.column_1 = None if self.column_1 is None else self.column_1.clone()
        copy.layers = [
            LayerCache(
                layer.mamba and layer.mamba.map(change),
                layer.attention if share_keys else layer.attention and layer.attention.map(change),
            )
            for layer in self.layers
        ]
        return copy
