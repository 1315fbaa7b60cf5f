"""Decoding caches of mixers: the interface, and the cache of mixers that keep a state.

:mod:`fusiontree.models.cache` combines the caches of all layers. After ``fix``, no tensor is reallocated: new tokens
are written in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor


class NewTokens(NamedTuple):
    """The tokens that one forward adds to a cache."""

    positions_BS: Tensor
    """Position of each token in its row's text, -1 for pads; the real tokens of a row are its last columns."""
    end: int
    """One more than the greatest position; known on the host."""
    continued: bool
    """True if the cache already holds tokens."""
    column_1: Tensor | None
    """Index of the new token's column, on the device; None if the cache is not fixed."""
    whole: bool
    """True if no text has pads before it: column c of the cache holds position c of every row."""
    shared: dict[Any, Any]
    """Results that depend only on the tokens' positions and are shared by several layers."""

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Return the result of ``compute()``; only the first call with this key computes it."""
        if key not in self.shared:
            self.shared[key] = compute()
        return self.shared[key]


class MixerCache(ABC):
    """What one mixer of one layer keeps of previous tokens."""

    @abstractmethod
    def fix(self, columns: int) -> None:
        """Allocate room for texts of ``columns`` tokens and never reallocate a tensor afterwards."""

    @abstractmethod
    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with every tensor changed."""

    def rehearsal(self) -> Self:
        """Return a cache for one trial step that changes nothing that later steps read."""
        return self.map(lambda tensor: tensor.clone())

    def step_bytes(self, columns: int) -> int:
        """Return the least bytes that a step of one token reads and writes after ``columns`` columns of text."""
        return 0

    def join(self, others: Sequence[Self]) -> Self:
        """Return a cache with the rows of this one and of ``others``, whose texts may differ in length.

        Texts end in the same column. Long prompts are prefilled row by row and then joined.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define join, which batches of long prompts need")


class StateCache(MixerCache):
    """Tensors of a size that does not depend on the number of tokens, such as a state; each has the rows as axis 0."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, ...] = ()
        self._fixed = False

    def previous(self) -> tuple[Tensor, ...]:
        """Return the tensors after the last token; empty if the cache is empty."""
        return self._kept

    def store(self, *tensors: Tensor) -> None:
        """Keep the tensors after the last token. May overwrite tensors that :meth:`previous` returned."""
        if not self._fixed:
            self._kept = tuple(tensor.detach() for tensor in tensors)
            return
        assert self._kept, "a fixed cache must have been filled before"
        for kept, newer in zip(self._kept, tensors, strict=True):
            kept.copy_(newer.detach())

    def step_bytes(self, columns: int) -> int:
        """Return the bytes of the tensors, each read and written."""
        return sum(2 * kept.nbytes for kept in self._kept)

    def join(self, others: Sequence[Self]) -> Self:
        """Return a cache with the rows of this one and of ``others``."""
        joined = type(self)()
        kept = zip(self._kept, *(other._kept for other in others), strict=True)
        joined._kept = tuple(torch.cat(tensors) for tensors in kept)
        return joined

    def fix(self, columns: int) -> None:
        """Copy every tensor into separate memory that later steps overwrite."""
        self._kept = tuple(kept.clone(memory_format=torch.contiguous_format) for kept in self._kept)
        self._fixed = True

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with every tensor changed."""
        copy = type(self)()
        copy._fixed, copy._kept = self._fixed, tuple(change(kept) for kept in self._kept)
        return copy


LayerCache = dict[str, MixerCache]
"""The caches of one block's mixers, by ``Mixer.module_name``."""
