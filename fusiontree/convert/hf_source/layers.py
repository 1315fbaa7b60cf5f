"""Mixers and block of the exported model, on any device and without kernels.

Shape legend: B rows, S new tokens, T cached and new tokens, C channels, H heads, K key/value heads, D channels of an
attention head; in the Mamba-2 mixer: G groups of B and C, P channels of a head, N size of the state.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fusiontree.convert.hf_model.configuration_fusiontree import FusionTreeConfig
from fusiontree.models.gate import Alignment, FusionGate
from fusiontree.models.mlp import MLP
from fusiontree.models.srte import sincos_encoding
from fusiontree.ops.attention.reference import visible_keys
from fusiontree.ops.attention.sdpa import sdpa
from fusiontree.ops.conv.reference import shifted_products
from fusiontree.ops.gate.reference import mix
from fusiontree.ops.norm.reference import gated_rms_norm, rms_norm
from fusiontree.ops.rotary.reference import apply_rotary
from fusiontree.ops.ssd.chunked import scan_segments

QUERIES_PER_BLOCK = 1024  # queries per attention mask, which limits the memory of masks
TOKENS_PER_SCAN = 4096  # tokens per call of the scan, which limits the memory of its matrices


class TokenLayout:
    """Columns, positions and padding of the new tokens of a forward."""

    def __init__(
        self, rows: int, length: int, mask: Tensor | None, start: int, first_B: Tensor | None, device: Any
    ) -> None:
        """Lay out ``length`` new columns after ``start`` cached columns, whose rows begin at the columns ``first_B``.

        ``mask`` is 1 on real tokens and 0 on pads, for all columns or for the new columns; None means no pads.

        Raises:
            ValueError: a pad is between real tokens or after a cached token, or a row has no real token.
        """
        self.columns_S = torch.arange(start, start + length, device=device)
        new_BS = None if mask is None else mask[:, -length:].to(device).bool()
        self.real_BS = None if new_BS is None or bool(new_BS.all()) else new_BS
        """True on real tokens; None if there are no pads."""
        if first_B is not None:
            if first_B.shape[0] != rows:
                raise ValueError(f"the cache holds {first_B.shape[0]} rows and the input {rows}")
            if self.real_BS is not None:
                raise ValueError(
                    "attention_mask marks new tokens as pads; pads are allowed before the first token only"
                )
        elif self.real_BS is None:
            first_B = torch.zeros(rows, dtype=torch.int64, device=device)
        else:
            first_B = self.real_BS.int().argmax(1)
            end_B = first_B + self.real_BS.sum(1)
            run_BS = (self.columns_S >= first_B[:, None]) & (self.columns_S < end_B[:, None])
            if not torch.equal(run_BS, self.real_BS) or not bool(self.real_BS.any(1).all()):
                raise ValueError("attention_mask must mark one run of real tokens in every row")
        self.first_B = first_B
        self.positions_BS = (self.columns_S - first_B[:, None]).clamp(min=0)
        """Position of each token in its text; 0 on pads on the left."""


class RMSNorm(nn.Module):
    """Root mean square norm; statistics in fp32."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x_BSC: Tensor) -> Tensor:
        """Return ``[B, S, C]``."""
        return rms_norm(x_BSC, self.weight, self.eps)


class TimeEncoding(nn.Module):
    """Shared relative time encoding: encodes each token's position in its text for all Mamba mixers."""

    def __init__(self, config: FusionTreeConfig) -> None:
        super().__init__()
        self.kind, self.channels = config.srte_encoding, config.hidden_size
        if self.kind == "learnable":
            self.weight = nn.Parameter(torch.zeros(config.max_position_embeddings, config.hidden_size))

    def forward(self, positions_BS: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return the encoding ``[B, S, C]``, or None without an encoding."""
        if self.kind == "none":
            return None
        if self.kind == "sincos":
            return sincos_encoding(positions_BS, self.channels, dtype)
        longest = int(positions_BS.max()) + 1
        if longest > self.weight.shape[0]:
            raise ValueError(
                f"a text of {longest} tokens is longer than max_position_embeddings {self.weight.shape[0]}, where the "
                f"learnable time encoding ends"
            )
        return F.embedding(positions_BS, self.weight).to(dtype)


class CausalConv(nn.Module):
    """Depthwise causal convolution and SiLU."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, width))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BSC: Tensor, cache: dict[str, Tensor] | None, name: str) -> Tensor:
        """Return ``[B, S, C]``; ``cache[name]`` holds the inputs before the first token and is updated."""
        before_BKC = None if cache is None else cache.get(name)
        if cache is not None:
            look_back = self.weight.shape[1] - 1
            if before_BKC is None:
                before_BKC = x_BSC.new_zeros(x_BSC.shape[0], look_back, x_BSC.shape[2])
            inputs_BTC = torch.cat([before_BKC, x_BSC], dim=1)
            cache[name] = inputs_BTC[:, inputs_BTC.shape[1] - look_back :].detach().clone()
        return shifted_products(x_BSC, self.weight, self.bias, None, before_BKC, "silu")


class SSMParameters(nn.Module):
    """Decay, skip and step bias of the state space heads, in fp32: half precision rounds decays near one."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.dt_bias = nn.Parameter(torch.zeros(heads))


class GatedRMSNorm(RMSNorm):
    """``RMSNorm(y * silu(z))`` of each group of channels separately."""

    def __init__(self, channels: int, eps: float, groups: int) -> None:
        super().__init__(channels, eps)
        self.groups = groups

    def forward(self, y_BSC: Tensor, z_BSC: Tensor) -> Tensor:
        """Return ``[B, S, C]``."""
        return gated_rms_norm(y_BSC, z_BSC, self.weight, groups=self.groups, eps=self.eps)


class Mamba2Mixer(nn.Module):
    """Projections, convolution, scan, gated norm, output projection; B and C have a separate projection."""

    def __init__(self, config: FusionTreeConfig) -> None:
        super().__init__()
        sizes = config.mamba
        self.head_dim, self.d_state, self.chunk_size = sizes["head_dim"], sizes["d_state"], sizes["chunk_size"]
        inner, heads = config.d_inner, config.d_inner // self.head_dim
        bc_channels = 2 * sizes["n_groups"] * self.d_state
        self.splits = [inner, inner, heads]  # z, x, dt
        self.in_proj = nn.Linear(config.hidden_size, sum(self.splits), bias=False)
        self.bc_proj = nn.Linear(config.hidden_size, bc_channels, bias=False)
        self.conv_x = CausalConv(inner, sizes["d_conv"])
        self.conv_bc = CausalConv(bc_channels, sizes["d_conv"])
        self.ssm = SSMParameters(heads)
        self.norm = GatedRMSNorm(inner, config.norm_eps, sizes["norm_groups"])
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, u_BSC: Tensor, layout: TokenLayout, cache: dict[str, Tensor] | None) -> Tensor:
        """Mix along the tokens: ``[B, S, C]``."""
        z_BSC, x_BSC, dt_BSH = self.in_proj(u_BSC).split(self.splits, dim=-1)
        bc_BSC = self.bc_proj(u_BSC)
        dt_BSH = F.softplus(dt_BSH.float() + self.ssm.dt_bias.float())
        if layout.real_BS is not None:
            # Zeros on pads: no input to the convolution, and steps of size zero leave the state as it is.
            x_BSC, bc_BSC, dt_BSH = (t * layout.real_BS.unsqueeze(-1) for t in (x_BSC, bc_BSC, dt_BSH))
        x_BSHP = self.conv_x(x_BSC, cache, "conv_x").unflatten(-1, (-1, self.head_dim))
        bc_BSC = self.conv_bc(bc_BSC, cache, "conv_bc")
        B_BSGN, C_BSGN = (t.unflatten(-1, (-1, self.d_state)) for t in bc_BSC.chunk(2, dim=-1))
        A_H, D_H = -torch.exp(self.ssm.A_log.float()), self.ssm.D.float()
        state_BHPN = None if cache is None else cache.get("state")
        outputs = []
        tokens = max(1, TOKENS_PER_SCAN // self.chunk_size) * self.chunk_size
        for x, dt, B, C in zip(*(t.split(tokens, dim=1) for t in (x_BSHP, dt_BSH, B_BSGN, C_BSGN)), strict=True):
            y, state_BHPN = scan_segments(x, dt, A_H, B, C, D_H, self.chunk_size, initial_state_BHPN=state_BHPN)
            outputs.append(y)
        if cache is not None and state_BHPN is not None:
            cache["state"] = state_BHPN.detach()
        return self.out_proj(self.norm(torch.cat(outputs, dim=1).flatten(2), z_BSC))


def attend(q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, positions_BS: Tensor, window: int | None) -> Tensor:
    """Attend from each new token to itself and the real tokens before it, within ``window`` tokens (None: all).

    The queries are the last S of the T columns of keys. They are processed in blocks, each with the keys that it can
    see, so that the cost of a window is linear in the number of tokens and no mask is square.
    """
    queries, keys = q_BSHD.shape[1], k_BTKD.shape[1]
    outputs = []
    for begin in range(0, queries, QUERIES_PER_BLOCK):
        end = min(begin + QUERIES_PER_BLOCK, queries)
        high = keys - queries + end
        low = 0 if window is None else max(0, keys - queries + begin - window + 1)
        visible_BST = visible_keys(end - begin, high - low, window, positions_BS[:, begin:end], q_BSHD.device)
        seen = k_BTKD[:, low:high], v_BTKD[:, low:high]
        outputs.append(sdpa(q_BSHD[:, begin:end], *seen, visible_BST.unsqueeze(1), None))
    return torch.cat(outputs, dim=1)


class LocalGlobalAttention(nn.Module):
    """Grouped-query attention: local heads first, then global heads; no group mixes local and global heads."""

    def __init__(self, config: FusionTreeConfig, layer: int) -> None:
        super().__init__()
        self.head_dim, self.window = config.head_dim, config.window_of_layer(layer)
        local_heads = config.num_heads - config.global_heads
        local_kv_heads = local_heads * config.num_kv_heads // config.num_heads
        self.heads = [local_heads, config.global_heads]
        self.kv_heads = [local_kv_heads, config.num_kv_heads - local_kv_heads]
        width, hidden = self.head_dim, config.hidden_size
        self.q_proj = nn.Linear(hidden, config.num_heads * width, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_kv_heads * width, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_kv_heads * width, bias=False)
        self.o_proj = nn.Linear(config.num_heads * width, hidden, bias=False)

    def forward(
        self,
        u_BSC: Tensor,
        cos_BSD: Tensor,
        sin_BSD: Tensor,
        layout: TokenLayout,
        cache: dict[str, Tensor] | None,
    ) -> Tensor:
        """Mix along the tokens: ``[B, S, C]``."""
        q_BSHD, k_BSKD, v_BSKD = (
            linear(u_BSC).unflatten(-1, (-1, self.head_dim)) for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries = apply_rotary(q_BSHD, cos_BSD, sin_BSD).split(self.heads, dim=2)
        keys = apply_rotary(k_BSKD, cos_BSD, sin_BSD).split(self.kv_heads, dim=2)
        values = v_BSKD.split(self.kv_heads, dim=2)
        outputs = []
        for name, window, q, k, v in zip(("local", "global"), (self.window, None), queries, keys, values, strict=True):
            if not q.shape[2]:
                continue
            if cache is not None:
                if f"{name}_k" in cache:
                    k, v = torch.cat([cache[f"{name}_k"], k], dim=1), torch.cat([cache[f"{name}_v"], v], dim=1)
                needed = 0 if window is None else max(0, k.shape[1] - window + 1)
                cache[f"{name}_k"], cache[f"{name}_v"] = k[:, needed:].detach(), v[:, needed:].detach()
            outputs.append(attend(q, k, v, layout.positions_BS, window))
        return self.o_proj(torch.cat(outputs, dim=2).flatten(2))


class FusionTreeBlock(GradientCheckpointingLayer):
    """One layer. Its letter in ``layer_pattern`` selects the mixers: F both, M Mamba, A attention."""

    def __init__(self, config: FusionTreeConfig, layer: int) -> None:
        super().__init__()
        self.letter = config.layer_pattern[layer]
        hidden = config.hidden_size
        self.norm = RMSNorm(hidden, config.norm_eps)
        if self.letter in "FM":
            self.mamba = Mamba2Mixer(config)
        if self.letter in "FA":
            self.attention = LocalGlobalAttention(config, layer)
        self.align = Alignment(2 if self.letter == "F" else 1, hidden) if config.use_alignment else None
        self.gate = FusionGate(config)
        self.out_proj = nn.Linear(hidden, hidden, bias=False)
        self.mlp = MLP(config)

    def forward(
        self,
        x_BSC: Tensor,
        srte_BSC: Tensor | None,
        cos_BSD: Tensor,
        sin_BSD: Tensor,
        layout: TokenLayout,
        cache: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the residual stream after this layer; ``cache`` holds this layer's cached tensors."""
        u_BSC = self.norm(x_BSC)
        outputs = []
        if self.letter in "FM":
            outputs.append(self.mamba(u_BSC if srte_BSC is None else u_BSC + srte_BSC, layout, cache))
        if self.letter in "FA":
            outputs.append(self.attention(u_BSC, cos_BSD, sin_BSD, layout, cache))
        ma_BSC = torch.cat(outputs, dim=-1)
        if self.align is not None:
            z_BSC = self.align(ma_BSC)
        else:
            z_BSC = sum(outputs) / 2  # a missing mixer counts as zeros
        present = {"F": "both", "M": "first", "A": "second"}[self.letter]
        return x_BSC + self.out_proj(mix(self.gate(z_BSC), ma_BSC, present)) + self.mlp(z_BSC)
