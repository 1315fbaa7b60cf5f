"""Decoding cache of attention: keys and values of previous tokens.

Local heads need only their window, so they keep a ring of ``window`` slots; global heads keep all tokens, in buffers
that grow by doubling. Each row of a batch counts positions separately, and queries never see stored pads.

Shape legend: B rows, S new tokens, T stored tokens, W slots of a ring, K key/value heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from fusiontree.models.mixers.cache import MixerCache, NewTokens
from fusiontree.ops.attention import roomy


class KeyValues(NamedTuple):
    """Keys and values with the positions of their tokens; -1 marks an empty slot.

    The memory layout is [B, K, T, D] (all slots of a head are contiguous), so matrix products over slots need no copy.
    """

    k_BTKD: Tensor
    v_BTKD: Tensor
    positions_BT: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> KeyValues:
        """Return a copy with ``change`` applied to every tensor, each in its memory layout."""
        k_BTKD, v_BTKD = (change(t.transpose(1, 2)).transpose(1, 2) for t in (self.k_BTKD, self.v_BTKD))
        return KeyValues(k_BTKD, v_BTKD, change(self.positions_BT))


class RingCache:
    """Keys and values of the last ``window`` tokens of each row: position p is in slot ``p % slots``.

    The number of slots can be below ``window`` as long as every position is below the number of slots.
    """

    def __init__(self, window: int, capacity: int, dtype: torch.dtype) -> None:
        self.window = window
        self._slots = min(window, max(capacity, 1))
        self._dtype = dtype
        self._kept: KeyValues | None = None

    @property
    def kept(self) -> KeyValues:
        """All slots; T = slots."""
        assert self._kept is not None, "the ring is empty"
        return self._kept

    def store(self, k_BSKD: Tensor, v_BSKD: Tensor, new: NewTokens) -> None:
        """Keep the last tokens of each row."""
        self._make_room(k_BSKD, new.end)
        k_BTKD, v_BTKD, positions_BT = self.kept
        rows, length = new.positions_BS.shape
        if length == 1:  # a decoding step: no pads, one slot per row changes
            row_B, slot_B = new.once(
                ("slots of a ring", self._slots),
                lambda: (torch.arange(rows, device=k_BSKD.device), new.positions_BS[:, 0] % self._slots),
            )
            k_BTKD[row_B, slot_B] = k_BSKD[:, 0].detach().to(self._dtype)
            v_BTKD[row_B, slot_B] = v_BSKD[:, 0].detach().to(self._dtype)
            positions_BT[row_B, slot_B] = new.positions_BS[:, 0]
            return
        # For each slot the newest position that belongs in it, and the column of that token, counted from the last.
        last_B1 = new.positions_BS[:, -1:]
        slot_W = torch.arange(self._slots, device=k_BSKD.device)
        wanted_BW = last_B1 - (last_B1 - slot_W) % self._slots
        column_BW = length - 1 - (last_B1 - wanted_BW)
        is_new_BW = (column_BW >= 0) & (wanted_BW >= 0)
        row_B1 = torch.arange(rows, device=k_BSKD.device)[:, None]
        column_BW = column_BW.clamp(min=0)
        mask = is_new_BW[..., None, None]
        k_BTKD.copy_(torch.where(mask, k_BSKD.detach().to(self._dtype)[row_B1, column_BW], k_BTKD))
        v_BTKD.copy_(torch.where(mask, v_BSKD.detach().to(self._dtype)[row_B1, column_BW], v_BTKD))
        positions_BT.copy_(torch.where(is_new_BW, wanted_BW, positions_BT))

    def extend(self, k_BSKD: Tensor, v_BSKD: Tensor, new: NewTokens) -> KeyValues:
        """Keep the new tokens and return all that they may see, themselves included."""
        if new.positions_BS.shape[1] == 1:
            self.store(k_BSKD, v_BSKD, new)
            return self.kept
        before = self.kept
        seen = KeyValues(
            torch.cat([before.k_BTKD, k_BSKD.to(self._dtype)], dim=1),
            torch.cat([before.v_BTKD, v_BSKD.to(self._dtype)], dim=1),
            torch.cat([before.positions_BT, new.positions_BS], dim=1),
        )
        self.store(k_BSKD, v_BSKD, new)
        return seen

    def extend_in_order(self, k_BSKD: Tensor, v_BSKD: Tensor, new: NewTokens) -> tuple[Tensor, Tensor]:
        """Keep the new tokens; return keys and values of the window before them and theirs, in order of position.

        Only for whole texts (:attr:`NewTokens.whole`).
        """
        before, start = self.kept, new.end - new.positions_BS.shape[1]
        slots_T = torch.arange(start - min(start, self.window - 1), start, device=k_BSKD.device) % self._slots
        seen = (
            torch.cat([before.k_BTKD[:, slots_T], k_BSKD.to(self._dtype)], dim=1),
            torch.cat([before.v_BTKD[:, slots_T], v_BSKD.to(self._dtype)], dim=1),
        )
        self.store(k_BSKD, v_BSKD, new)
        return seen

    def join(self, others: Sequence[Self]) -> Self:
        """Return a cache with the rows of this one and of ``others``."""
        caches, slots = [self, *others], max(cache._slots for cache in (self, *others))
        joined = type(self)(self.window, slots, self._dtype)
        if self._kept is None:
            return joined
        # A ring with fewer slots has not wrapped around: see _make_room.
        rings = [
            cache.kept if cache._slots == slots else _enlarged(cache.kept, slots, used=cache._slots) for cache in caches
        ]
        joined._kept = KeyValues(*map(torch.cat, zip(*rings, strict=True))).map(Tensor.contiguous)
        return joined

    def fix(self, columns: int) -> None:
        """Allocate slots for texts of ``columns`` tokens; no tensor is reallocated until texts are longer."""
        if self._kept is not None:
            self._make_room(self._kept.k_BTKD, columns)

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with every tensor changed."""
        copy = type(self)(self.window, self._slots, self._dtype)
        copy._kept = self._kept and self._kept.map(change)
        return copy

    def _make_room(self, like_BSKD: Tensor, end: int) -> None:
        old = self._slots
        if end > old and old < self.window:
            self._slots = min(self.window, max(end, 2 * old))
        if self._kept is None:
            self._kept = _empty(like_BSKD, self._slots, self._dtype)
        elif self._slots > old:
            # Every position so far is below the old number of slots, so position p is in slot p.
            self._kept = _enlarged(self._kept, self._slots, used=old)


class GrowingCache:
    """Keys and values of all tokens, in order of arrival, in a buffer that grows by doubling."""

    def __init__(self, capacity: int, dtype: torch.dtype) -> None:
        self.length = 0
        """Columns in use, pads included; not updated once the cache is fixed."""
        self._capacity = roomy(capacity)
        self._dtype = dtype
        self._buffer: KeyValues | None = None
        self._fixed = False

    @property
    def kept(self) -> KeyValues:
        """Views of all stored tokens; T = length. For a fixed cache, views of all slots, empty slots included."""
        assert self._buffer is not None, "nothing is stored"
        if self._fixed:
            return self._buffer
        return KeyValues(*(tensor[:, : self.length] for tensor in self._buffer))

    def store(self, k_BSKD: Tensor, v_BSKD: Tensor, new: NewTokens) -> None:
        """Append the new tokens."""
        if self._fixed:
            assert self._buffer is not None and new.column_1 is not None, "a fixed cache needs a buffer and a column"
            self._buffer.k_BTKD.index_copy_(1, new.column_1, k_BSKD.detach().to(self._dtype))
            self._buffer.v_BTKD.index_copy_(1, new.column_1, v_BSKD.detach().to(self._dtype))
            self._buffer.positions_BT.index_copy_(1, new.column_1, new.positions_BS)
            return
        start, end = self.length, self.length + new.positions_BS.shape[1]
        if end > self._capacity:
            self._capacity = roomy(max(end, 2 * self._capacity))
        if self._buffer is None:
            self._buffer = _empty(k_BSKD, self._capacity, self._dtype)
        elif self._buffer.positions_BT.shape[1] < self._capacity:
            self._buffer = _enlarged(self._buffer, self._capacity, used=start)
        self._buffer.k_BTKD[:, start:end] = k_BSKD.detach()
        self._buffer.v_BTKD[:, start:end] = v_BSKD.detach()
        self._buffer.positions_BT[:, start:end] = new.positions_BS
        self.length = end

    def extend(self, k_BSKD: Tensor, v_BSKD: Tensor, new: NewTokens) -> KeyValues:
        """Append the new tokens and return all that they may see, themselves included."""
        self.store(k_BSKD, v_BSKD, new)
        return self.kept

    def extend_in_order(self, k_BSKD: Tensor, v_BSKD: Tensor, new: NewTokens) -> tuple[Tensor, Tensor]:
        """Append the new tokens; return all keys and values in order of position, for whole texts."""
        seen = self.extend(k_BSKD, v_BSKD, new)
        return seen.k_BTKD, seen.v_BTKD

    def join(self, others: Sequence[Self]) -> Self:
        """Return a cache with the rows of this one and of ``others``; shorter texts get empty columns before them."""
        caches = [self, *others]
        joined = type(self)(max(cache._capacity for cache in caches), self._dtype)
        joined.length = max(cache.length for cache in caches)
        if self._buffer is None:
            return joined
        rows = [cache.kept for cache in caches]
        like = self.kept.k_BTKD[:1, :1].expand(sum(len(kept.positions_BT) for kept in rows), -1, -1, -1)
        joined._buffer = _empty(like, joined._capacity, self._dtype)
        start = 0
        for kept in rows:
            count, length = kept.positions_BT.shape
            for target, source in zip(joined._buffer, kept, strict=True):
                target[start : start + count, joined.length - length : joined.length] = source
            start += count
        return joined

    def fix(self, columns: int) -> None:
        """Allocate ``columns`` columns; from now on ``new.column_1`` is the column of the new token."""
        if self._buffer is None:
            return
        if self._buffer.positions_BT.shape[1] < columns:
            self._capacity = roomy(columns)
            self._buffer = _enlarged(self._buffer, self._capacity, used=self._buffer.positions_BT.shape[1])
        self._fixed = True

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with every tensor changed."""
        copy = type(self)(self._capacity, self._dtype)
        copy.length, copy._fixed = self.length, self._fixed
        copy._buffer = self._buffer and self._buffer.map(change)
        return copy


def _empty(like_BSKD: Tensor, slots: int, dtype: torch.dtype) -> KeyValues:
    rows, _, heads, width = like_BSKD.shape
    device = like_BSKD.device
    k_BTKD, v_BTKD = (
        torch.zeros(rows, heads, slots, width, dtype=dtype, device=device).transpose(1, 2) for _ in range(2)
    )
    return KeyValues(k_BTKD, v_BTKD, torch.full((rows, slots), -1, dtype=torch.int64, device=device))


def _enlarged(old: KeyValues, slots: int, used: int) -> KeyValues:
    larger = _empty(old.k_BTKD, slots, old.k_BTKD.dtype)
    for target, source in zip(larger, old, strict=True):
        target[:, :used] = source[:, :used]
    return larger


class AttentionCache(MixerCache):
    """Keys and values of the local and of the global heads."""

    def __init__(self, window: int, capacity: int, dtype: torch.dtype) -> None:
        self.local = RingCache(window, capacity, dtype)
        self.everything = GrowingCache(capacity, dtype)

    def fix(self, columns: int) -> None:
        """Allocate room for texts of ``columns`` tokens and never reallocate a tensor afterwards."""
        self.local.fix(columns)
        self.everything.fix(columns)

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with every tensor changed."""
        copy = type(self).__new__(type(self))
        copy.local, copy.everything = self.local.map(change), self.everything.map(change)
        return copy

    def step_bytes(self, columns: int) -> int:
        """Return the bytes of the keys and values that a step reads."""
        total = 0
        for kept in (self.local._kept, self.everything._buffer):
            if kept is not None:
                slots = kept.positions_BT.shape[1]
                total += 2 * kept.k_BTKD.nbytes * min(slots, columns) // slots
        return total

    def join(self, others: Sequence[Self]) -> Self:
        """Return a cache with the rows of this one and of ``others``."""
        copy = type(self).__new__(type(self))
        copy.local = self.local.join([other.local for other in others])
        copy.everything = self.everything.join([other.everything for other in others])
        return copy

    def rehearsal(self) -> Self:
        """Return this cache: a trial step only writes the slots of the next token, which are overwritten unread."""
        return self
