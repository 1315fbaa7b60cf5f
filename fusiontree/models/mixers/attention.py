"""Attention with rotary positions: local heads (first) see a window, global heads (last) see the full document.

Shape legend: B rows, S tokens, H query heads, K key/value heads, D channels of a head, C channels of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from fusiontree.models.config import ModelConfig
from fusiontree.models.flops import visible_keys
from fusiontree.models.mixers import MIXERS
from fusiontree.models.mixers.base import Activations, ContextTools, Mixer, MixerInputs, Seconds
from fusiontree.models.mixers.cache import NewTokens
from fusiontree.models.mixers.kv_cache import AttentionCache, GrowingCache, RingCache
from fusiontree.models.mixers.split import Block, Split, column, row
from fusiontree.ops.attention import attention, cached_attention, decode_attention, key_bias
from fusiontree.ops.documents import Documents
from fusiontree.ops.linear import project
from fusiontree.ops.linear.side_by_side import product_in
from fusiontree.ops.recompute import recomputed
from fusiontree.ops.rotary import rotate_and_cut
from fusiontree.ops.step import has_kernels

# Rates of one H100 SXM in bf16, from the profiled step of hybrid_1b_32k (docs/speed.md; flash-attn-4):
_GLOBAL_FLOPS = 545e12
"""97 ms for 52.8 TFLOP (4 heads of 128, causal, forward and backward)."""
_LOCAL_FLOPS = 308e12
"""31.5 ms for 9.7 TFLOP (12 heads, window 1,024)."""


class AttentionCore(nn.Module):
    """Scores, softmax and weighted sum of the local or the global heads. Has no parameters; a parallel plan can replace
    it."""

    def __init__(self, window: int | None, backend: str) -> None:
        super().__init__()
        self.window = window
        self.backend = backend

    def forward(self, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, documents: Documents | None) -> Tensor:
        """Return ``[B, S, H, D]``; each token sees itself and earlier tokens of its document and window."""
        return self.begin(q_BSHD, k_BSKD, v_BSKD, documents)()

    def begin(
        self, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, documents: Documents | None
    ) -> Callable[[], Tensor]:
        """Start communication that can overlap other work; call the returned function to finish :meth:`forward`."""
        return partial(attention, q_BSHD, k_BSKD, v_BSKD, window=self.window, documents=documents, backend=self.backend)

    def decode(
        self, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, cache: RingCache | GrowingCache, new: NewTokens
    ) -> Tensor:
        """Return ``[B, S, H, D]`` for tokens that continue the texts in ``cache``; add their keys and values to it."""
        if q_BSHD.shape[1] > 1 and new.whole:  # a chunk of a long prompt: no mask of all its keys
            k_BTKD, v_BTKD = cache.extend_in_order(k_BSKD, v_BSKD, new)
            return attention(q_BSHD, k_BTKD, v_BTKD, window=self.window, backend=self.backend)
        seen = cache.extend(k_BSKD, v_BSKD, new)
        if q_BSHD.shape[1] == 1 and not torch.is_grad_enabled():
            # Layers with equal windows hold the same tokens in the same slots.
            bias_BT = new.once(
                ("bias", type(cache), seen.positions_BT.shape[1], self.window),
                lambda: key_bias(seen.positions_BT, new.positions_BS, self.window),
            )
            return decode_attention(q_BSHD, seen.k_BTKD, seen.v_BTKD, bias_BT)
        return cached_attention(
            q_BSHD,
            seen.k_BTKD,
            seen.v_BTKD,
            key_positions_BT=seen.positions_BT,
            query_positions_BS=new.positions_BS,
            window=self.window,
        )


class LocalGlobalAttention(Mixer):
    """Grouped-query attention: local heads first, then global heads; no group mixes local and global heads.

    The numbers of heads are derived from the projections' outputs, so the same code runs on a tensor parallel rank's
    share of the local and of the global heads.
    """

    name: ClassVar[str] = "attention"
    module_name: ClassVar[str] = "attention"
    weighed_as_second: ClassVar[bool] = True
    output_projection: ClassVar[str] = "o_proj"
    fp8_products: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "mixer_in"),
        "o_proj": "mixer_out",
    }
    fused_projections = False

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.head_dim = config.attention_head_dim
        self.backend = config.kernels.elementwise
        self.rotates_global = config.global_rope
        self.num_heads, self.local_heads = config.num_heads, config.local_heads
        self.local_kv_heads, self.global_kv_heads = config.local_kv_heads, config.global_kv_heads
        width, hidden = self.head_dim, config.hidden_size
        self.q_proj = nn.Linear(hidden, config.num_heads * width, bias=False)
        self.k_proj = nn.Linear(hidden, config.kv_heads * width, bias=False)
        self.v_proj = nn.Linear(hidden, config.kv_heads * width, bias=False)
        self.local_core = AttentionCore(config.window_of_layer(layer), config.kernels.attention)
        self.global_core = AttentionCore(None, config.kernels.attention)
        self.o_proj = nn.Linear(config.num_heads * width, hidden, bias=False)

    def forward(self, u_BSC: Tensor, inputs: MixerInputs, cache: AttentionCache | None = None) -> Tensor:
        """Mix along the tokens; ``cache`` keeps keys and values, and ``inputs.new`` is required with it."""
        q, k, v = (
            x_BSC.unflatten(-1, (-1, self.head_dim))
            for x_BSC in project(u_BSC, (self.q_proj, self.k_proj, self.v_proj), joint=self.fused_projections)
        )
        return product_in(self._mix(q, k, v, inputs, cache), self.o_proj, inputs.place_BSC)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, inputs: MixerInputs, cache: AttentionCache | None) -> Tensor:
        """Return the input of the output projection, ``[B, S, H*D]``."""
        assert inputs.cos_BSD is not None and inputs.sin_BSD is not None, "attention needs the rotary tables"
        documents, new = inputs.documents, inputs.new
        local, local_kv = self.local_part(q.shape[2], k.shape[2])
        # From here on, local and global heads are computed separately.
        rotate = partial(rotate_and_cut, first=(local, local_kv), backend=self.backend)
        if self.rotates_global or local == q.shape[2]:
            queries, keys = rotate(q, k, inputs.cos_BSD, inputs.sin_BSD)
        else:
            # The rotation returns contiguous heads, which the attention kernels expect.
            queries, keys = (
                (x[:, :, :n].contiguous(), x[:, :, n:].contiguous()) for x, n in ((q, local), (k, local_kv))
            )
            if local:
                (q_local, _), (k_local, _) = rotate(queries[0], keys[0], inputs.cos_BSD, inputs.sin_BSD)
                queries, keys = (q_local, queries[1]), (k_local, keys[1])
        values = v.split([local_kv, v.shape[2] - local_kv], dim=2)
        cores = (self.local_core, self.global_core)
        caches = (cache.local, cache.everything) if cache else (None, None)
        outputs: list[Callable[[], Tensor]] = []
        for core, kept, q, k, v in zip(cores, caches, queries, keys, values, strict=True):
            if q.shape[2] == 0:
                continue
            if kept is None:
                outputs.append(core.begin(q, k, v, documents))
                continue
            assert new is not None
            if new.continued:
                outputs.append(partial(core.decode, q, k, v, kept, new))
            else:
                kept.store(k, v, new)
                outputs.append(core.begin(q, k, v, documents))
        heads = [finish() for finish in outputs]
        both = recomputed(_side_by_side, *heads) if len(heads) > 1 else heads[0]
        return both.flatten(2)

    def step_projections(self) -> tuple[nn.Module, ...]:
        """Return the projections to queries, keys and values."""
        return self.q_proj, self.k_proj, self.v_proj

    def step(self, projected_BM: Tensor, inputs: MixerInputs, cache: AttentionCache) -> Tensor:
        """Rotate, store keys and values, and attend, for one token."""
        width = self.head_dim
        heads, kv_heads = self.num_heads, self.local_kv_heads + self.global_kv_heads
        new = inputs.new
        assert new is not None and inputs.cos_BSD is not None and inputs.sin_BSD is not None
        if new.column_1 is None or not has_kernels(projected_BM, self.backend):
            q, k, v = projected_BM[:, None].unflatten(-1, (-1, width)).split([heads, kv_heads, kv_heads], dim=2)
            return self._mix(q, k, v, inputs, cache)[:, 0]
        from fusiontree.ops.step.attention_triton import Store, attend

        return attend(
            projected_BM,
            (inputs.cos_BSD[:, 0], inputs.sin_BSD[:, 0]),
            Store(*cache.local.kept) if self.local_kv_heads else None,
            Store(*cache.everything.kept) if self.global_kv_heads else None,
            new.positions_BS[:, 0],
            new.column_1,
            heads=(heads, heads // kv_heads),
            window=self.local_core.window or 0,
            rotates_global=self.rotates_global,
        )

    def step_output(self) -> nn.Module:
        """Return the output projection."""
        return self.o_proj

    def local_part(self, heads: int, kv_heads: int) -> tuple[int, int]:
        """Return the numbers of local heads among ``heads`` query heads and among ``kv_heads`` key/value heads.

        ``heads`` is the total number or a tensor parallel rank's equal share of it. If the share of local or global
        key/value heads is below one, the rank holds a copy of one head.
        """
        shares = self.num_heads // heads
        assert self.local_heads % shares == 0, f"{self.local_heads} local heads in {shares} equal parts"
        local = self.local_heads // shares
        local_kv, global_kv = _share(self.local_kv_heads, shares), _share(self.global_kv_heads, shares)
        assert local_kv + global_kv == kv_heads, f"{kv_heads} key/value heads beside {heads} of {self.num_heads} heads"
        return local, local_kv

    def use_context_parallel(self, tools: ContextTools) -> None:
        """Give local heads the window before the chunk and global heads the full sequence."""
        self.local_core = tools.windowed_attention(self.local_core)
        self.global_core = tools.full_attention(self.global_core)

    @classmethod
    def tp_plan(cls, config: ModelConfig) -> dict[str, Split]:
        """Split local heads and global heads."""
        width = config.attention_head_dim

        def heads(local: int, everything: int) -> tuple[Block, Block]:
            return Block("local", local * width, local), Block("global", everything * width, everything)

        queries = heads(config.local_heads, config.global_heads)
        kv = column(*heads(config.local_kv_heads, config.global_kv_heads))
        return {
            "q_proj.weight": column(*queries),
            "k_proj.weight": kv,
            "v_proj.weight": kv,
            "o_proj.weight": row(*queries),
        }

    @classmethod
    def tp_problems(cls, config: ModelConfig, tp: int) -> Iterator[str]:
        """Yield the reasons why the heads of a kind cannot be split over ``tp`` ranks."""
        if config.local_heads % tp or config.global_heads % tp:
            yield (
                f"{config.local_heads} local + {config.global_heads} global heads: each kind must divide by {tp}, "
                f"or ranks would differ in work (num_heads and global_heads set them)"
            )
        for kind, heads in (("local", config.local_kv_heads), ("global", config.global_kv_heads)):
            if heads and heads % tp and tp % heads:
                yield f"{heads} {kind} key/value heads are neither a multiple nor a divisor of {tp}"

    @classmethod
    def exchanged_bytes(cls, config: ModelConfig, layer: int, tokens: float, cp: int, tp: int, itemsize: int) -> float:
        """Return the bytes of the sequence's global keys and values and of the window's local keys and values."""
        width = 2 * config.attention_head_dim
        global_kv, local_kv = (
            heads * width / min(tp, max(heads, 1)) for heads in (config.global_kv_heads, config.local_kv_heads)
        )
        window = min(config.window_of_layer(layer), tokens)
        return (tokens * (cp - 1) * global_kv + window * local_kv) * itemsize

    @classmethod
    def flops(cls, config: ModelConfig, layer: int, lengths: Sequence[int]) -> float:
        """Return ``4 head_dim`` per head and visible key."""
        tokens, window = sum(lengths), config.window_of_layer(layer)
        local = sum(visible_keys(length, window) for length in lengths) / tokens
        everything = sum(visible_keys(length) for length in lengths) / tokens
        return 4 * config.attention_head_dim * (config.local_heads * local + config.global_heads * everything)

    @classmethod
    def activations(cls, config: ModelConfig, tp: int) -> Activations:
        """Count projections and global outputs; rotated queries and keys and local outputs are cheap."""
        width = config.attention_head_dim
        heads, kv = config.num_heads * width / tp, config.kv_heads * width / min(tp, config.kv_heads)
        return Activations(
            heads + 2 * kv + config.global_heads * width / tp, heads + kv + config.local_heads * width / tp
        )

    @classmethod
    def seconds(cls, config: ModelConfig, layer: int, length: int) -> Seconds:
        """Return the time of global heads, whose results recomputation keeps, and of local heads."""
        per_key = 12 * config.attention_head_dim / length
        local_keys = visible_keys(length, config.window_of_layer(layer))
        return Seconds(
            kept=per_key * config.global_heads * visible_keys(length) / _GLOBAL_FLOPS,
            repeated=per_key * config.local_heads * local_keys / _LOCAL_FLOPS,
        )

    @classmethod
    def new_cache(cls, config: ModelConfig, layer: int, capacity: int, dtype: torch.dtype) -> AttentionCache:
        """Return a cache of the local heads' window and of all keys and values of the global heads."""
        return AttentionCache(config.window_of_layer(layer), capacity, dtype)


def _side_by_side(*outputs: Tensor) -> Tensor:
    return torch.cat(outputs, dim=2)


def _share(heads: int, shares: int) -> int:
    """Return how many of ``heads`` each of ``shares`` equal parts holds; several parts may hold the same head."""
    assert heads % shares == 0 or (heads and shares % heads == 0), f"{heads} heads in {shares} equal parts"
    return -(-heads // shares)


MIXERS.register(LocalGlobalAttention.name, LocalGlobalAttention)
