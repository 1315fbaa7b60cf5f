"""What decoding keeps of the tokens before: convolution inputs, states, keys and values.

Local heads need their window alone, so they keep a ring of ``window`` slots; global heads keep everything, in
buffers that grow by doubling. Rows of a batch have positions of their own: prompts of different length are padded on
the left, and pads are stored nowhere that a query could see.

Shape legend: B rows, S new tokens, T stored tokens, W slots of a ring, K key/value heads (or K-1: inputs that a
convolution of width K looks back to), D channels of an attention head, C channels, H P N heads, channels and size of
a state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from fusiontree.models.config import ModelConfig
from fusiontree.ops.documents import Documents


class NewTokens(NamedTuple):
    """The tokens that one forward adds to a cache."""

    positions_BS: Tensor
    """Position in its row's text, -1 for pads; the valid tokens of a row are its last columns."""
    end: int
    """One more than the greatest position, known without asking the device."""
    continued: bool
    """True when the cache holds tokens before these."""


class KeyValues(NamedTuple):
    """Keys and values with the positions of their tokens; -1 marks an empty slot."""

    k_BTKD: Tensor
    v_BTKD: Tensor
    positions_BT: Tensor


class RingCache:
    """Keys and values of the last ``window`` tokens of each row: position p lives in slot ``p % slots``.

    There are fewer slots than the window as long as every position is below their number.
    """

    def __init__(self, window: int, capacity: int, dtype: torch.dtype) -> None:
        self.window = window
        self._slots = min(window, max(capacity, 1))
        self._dtype = dtype
        self._kept: KeyValues | None = None

    @property
    def kept(self) -> KeyValues:
        """Everything stored; T = slots."""
        assert self._kept is not None, "the ring is empty"
        return self._kept

    def store(self, k_BSKD: Tensor, v_BSKD: Tensor, new: NewTokens) -> None:
        """Keep the last tokens of each row."""
        self._make_room(k_BSKD, new.end)
        k_BTKD, v_BTKD, positions_BT = self.kept
        rows, length = new.positions_BS.shape
        if length == 1:  # the step of decoding: no pads, one slot a row changes
            row_B = torch.arange(rows, device=k_BSKD.device)
            slot_B = new.positions_BS[:, 0] % self._slots
            k_BTKD[row_B, slot_B] = k_BSKD[:, 0].detach().to(self._dtype)
            v_BTKD[row_B, slot_B] = v_BSKD[:, 0].detach().to(self._dtype)
            positions_BT[row_B, slot_B] = new.positions_BS[:, 0]
            return
        # The newest position that belongs in each slot; its column counts back from the row's last token.
        last_B1 = new.positions_BS[:, -1:]
        slot_W = torch.arange(self._slots, device=k_BSKD.device)
        wanted_BW = last_B1 - (last_B1 - slot_W) % self._slots
        column_BW = length - 1 - (last_B1 - wanted_BW)
        is_new_BW = (column_BW >= 0) & (wanted_BW >= 0)
        row_B1 = torch.arange(rows, device=k_BSKD.device)[:, None]
        column_BW = column_BW.clamp(min=0)
        mask = is_new_BW[..., None, None]
        self._kept = KeyValues(
            torch.where(mask, k_BSKD.detach().to(self._dtype)[row_B1, column_BW], k_BTKD),
            torch.where(mask, v_BSKD.detach().to(self._dtype)[row_B1, column_BW], v_BTKD),
            torch.where(is_new_BW, wanted_BW, positions_BT),
        )

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

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with every tensor changed."""
        copy = type(self)(self.window, self._slots, self._dtype)
        copy._kept = self._kept and KeyValues(*map(change, self._kept))
        return copy

    def _make_room(self, like_BSKD: Tensor, end: int) -> None:
        old = self._slots
        if end > old and old < self.window:
            self._slots = min(self.window, max(end, 2 * old))
        if self._kept is None:
            self._kept = _empty(like_BSKD, self._slots, self._dtype)
        elif self._slots > old:
            # Every position so far is below the old number of slots, so each is in the slot of its own number.
            self._kept = _enlarged(self._kept, self._slots, used=old)


class GrowingCache:
    """Keys and values of every token, in the order they came; amortised growth."""

    def __init__(self, capacity: int, dtype: torch.dtype) -> None:
        self.length = 0
        """Columns in use, pads included."""
        self._capacity = capacity
        self._dtype = dtype
        self._buffer: KeyValues | None = None

    @property
    def kept(self) -> KeyValues:
        """Everything stored, as views; T = length."""
        assert self._buffer is not None, "nothing is stored"
        return KeyValues(*(tensor[:, : self.length] for tensor in self._buffer))

    def store(self, k_BSKD: Tensor, v_BSKD: Tensor, new: NewTokens) -> None:
        """Append the new tokens."""
        start, end = self.length, self.length + new.positions_BS.shape[1]
        if end > self._capacity:
            self._capacity = max(end, 2 * self._capacity)
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

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with every tensor changed."""
        copy = type(self)(self._capacity, self._dtype)
        copy.length = self.length
        copy._buffer = self._buffer and KeyValues(*map(change, self._buffer))
        return copy


def _empty(like_BSKD: Tensor, slots: int, dtype: torch.dtype) -> KeyValues:
    rows, _, heads, width = like_BSKD.shape
    device = like_BSKD.device
    k_BTKD = torch.zeros(rows, slots, heads, width, dtype=dtype, device=device)
    return KeyValues(k_BTKD, torch.zeros_like(k_BTKD), torch.full((rows, slots), -1, dtype=torch.int64, device=device))


def _enlarged(old: KeyValues, slots: int, used: int) -> KeyValues:
    larger = _empty(old.k_BTKD, slots, old.k_BTKD.dtype)
    for target, source in zip(larger, old, strict=True):
        target[:, :used] = source[:, :used]
    return larger


class MambaCache:
    """Inputs of the two convolutions' last K-1 tokens, and the state after the last token."""

    def __init__(self, look_back: int) -> None:
        self._look_back = look_back
        self._conv_x_BKC: Tensor | None = None
        self._conv_bc_BKC: Tensor | None = None
        self._state_BHPN: Tensor | None = None

    def before(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return both convolutions' inputs before the new tokens and the state; None where there are none yet."""
        return self._conv_x_BKC, self._conv_bc_BKC, self._state_BHPN

    def store_inputs(self, x_BSC: Tensor, bc_BSC: Tensor, padding_mask_BS: Tensor | None) -> None:
        """Keep the last inputs of each convolution; pads become zeros, as the tokens before a text are."""
        self._conv_x_BKC = self._last(self._conv_x_BKC, x_BSC, padding_mask_BS)
        self._conv_bc_BKC = self._last(self._conv_bc_BKC, bc_BSC, padding_mask_BS)

    def store_state(self, state_BHPN: Tensor) -> None:
        """Keep the state after the last token."""
        self._state_BHPN = state_BHPN.detach()

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with every tensor changed."""
        copy = type(self)(self._look_back)
        copy._conv_x_BKC = None if self._conv_x_BKC is None else change(self._conv_x_BKC)
        copy._conv_bc_BKC = None if self._conv_bc_BKC is None else change(self._conv_bc_BKC)
        copy._state_BHPN = None if self._state_BHPN is None else change(self._state_BHPN)
        return copy

    def _last(self, before_BKC: Tensor | None, new_BSC: Tensor, padding_mask_BS: Tensor | None) -> Tensor:
        last_BSC = new_BSC.detach()[:, -self._look_back :]
        if padding_mask_BS is not None:
            last_BSC = last_BSC * padding_mask_BS[:, -self._look_back :, None]
        missing = self._look_back - last_BSC.shape[1]
        if not missing:
            return last_BSC.clone()  # a view would keep the whole input alive
        if before_BKC is None:
            before_BKC = last_BSC.new_zeros(last_BSC.shape[0], missing, last_BSC.shape[2])
        return torch.cat([before_BKC[:, -missing:], last_BSC], dim=1)


class AttentionCache:
    """Keys and values of the local and of the global heads."""

    def __init__(self, window: int, capacity: int, dtype: torch.dtype) -> None:
        self.local = RingCache(window, capacity, dtype)
        self.everything = GrowingCache(capacity, dtype)

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with every tensor changed."""
        copy = type(self).__new__(type(self))
        copy.local, copy.everything = self.local.map(change), self.everything.map(change)
        return copy


class LayerCache(NamedTuple):
    """What one block keeps; None for a branch it does not have."""

    mamba: MambaCache | None
    attention: AttentionCache | None


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

    def documents(self, length: int) -> Documents:
        """Return the boundaries of ``length`` tokens that continue every row's text."""
        positions_BS = self.positions_B[:, None] + torch.arange(length, device=self.positions_B.device)
        starts = torch.arange(self.rows + 1, dtype=torch.int32, device=self.positions_B.device) * length
        return Documents(positions_BS, torch.zeros_like(positions_BS, dtype=torch.int32), starts, length, None)

    def advance(self, counts: Sequence[int]) -> None:
        """Note that every row's text became ``counts`` tokens longer."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self.positions_B = self.positions_B + torch.tensor(counts, device=self.positions_B.device)

    def select(self, rows: Tensor | Sequence[int]) -> DecodeCache:
        """Return a cache that holds the given rows in the given order; a row may be repeated or left out."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.positions_B.device)

        def pick(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, index)

        copy = DecodeCache.__new__(DecodeCache)
        copy.positions_B = pick(self.positions_B)
        copy.lengths = [self.lengths[row] for row in index.tolist()]
        copy.layers = [
            LayerCache(layer.mamba and layer.mamba.map(pick), layer.attention and layer.attention.map(pick))
            for layer in self.layers
        ]
        return copy
