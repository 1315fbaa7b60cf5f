"""FusionTree language model for transformers, in one file of plain PyTorch (no kernels, any device).

Every layer reads the sequence twice in parallel, by a Mamba-2 mixer and by attention whose first heads see a window
and whose last heads see everything; a gate mixes the two, per token and channel.

Shape legend: B rows, S new tokens, T stored and new tokens, C channels, H heads, K key/value heads, D channels of an
attention head; in the Mamba-2 mixer: G groups of B and C, P channels of a head, N size of the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .configuration_fusiontree import FusionTreeConfig

QUERIES_PER_BLOCK = 1024  # number of queries that an attention mask covers at one time
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")  # how others mark several texts in a row


class FusionTreeCache:
    """What decoding keeps: convolution inputs and state of each Mamba mixer, keys and values of each attention.

    All rows of a batch end in the same column; shorter texts are padded on the left.
    """

    is_compileable = False

    def __init__(self, num_layers: int) -> None:
        self.columns = 0
        """Tokens seen, pads included."""
        self.first_B: Tensor | None = None
        """Column of each row's first real token."""
        self.layers: list[dict[str, Tensor]] = [{} for _ in range(num_layers)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens seen, pads included."""
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue what row ``beam_idx[i]`` was (beam search)."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        self._map(lambda tensor: tensor[indices])

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.first_B = None if self.first_B is None else change(self.first_B)
        self.layers = [{name: change(tensor) for name, tensor in layer.items()} for layer in self.layers]


class Places:
    """Where the new tokens of a forward stand."""

    def __init__(self, rows: int, length: int, mask: Tensor | None, cache: FusionTreeCache | None, device: Any) -> None:
        """Place ``length`` new columns after those of the cache.

        Args:
            rows: of the batch.
            length: new columns.
            mask: 1 on real tokens and 0 on pads, for all columns or for the new ones; None means no pads.
            cache: what was seen before.
            device: of the tokens.

        Raises:
            ValueError: pads between real tokens, a row of pads, or pads on the right of what a cache is to keep.
        """
        self.start = cache.columns if cache is not None else 0
        self.columns_S = torch.arange(self.start, self.start + length, device=device)
        if self.start:
            assert cache is not None and cache.first_B is not None
            if cache.first_B.shape[0] != rows:
                raise ValueError(f"the cache holds {cache.first_B.shape[0]} rows and the input {rows}")
            self.first_B = cache.first_B
            self.real_BS: Tensor | None = None
            if mask is not None and not bool(mask[:, -length:].bool().all()):
                raise ValueError(
                    "attention_mask marks new tokens as pads; pads are allowed before the first token only"
                )
        elif mask is None or bool(mask.bool().all()):
            self.first_B = torch.zeros(rows, dtype=torch.int64, device=device)
            self.real_BS = None
        else:
            self.real_BS = mask.to(device).bool()
            self.first_B = self.real_BS.int().argmax(1)
            end_B = self.first_B + self.real_BS.sum(1)
            run_BS = (self.columns_S >= self.first_B[:, None]) & (self.columns_S < end_B[:, None])
            if not torch.equal(run_BS, self.real_BS) or not bool(self.real_BS.any(1).all()):
                raise ValueError("attention_mask must mark one run of real tokens in every row")
            if cache is not None and not bool(self.real_BS[:, -1].all()):
                raise ValueError(
                    "rows are padded on the right, so a text cannot be continued; use padding_side='left', or "
                    "use_cache=False for a single forward"
                )
        self.real_or_all = ... if self.real_BS is None else self.real_BS
        self.positions_BS = (self.columns_S - self.first_B[:, None]).clamp(min=0)
        if cache is not None:
            cache.first_B = self.first_B


class RMSNorm(nn.Module):
    """Root mean square norm over the last axis, or over equal groups of it; statistics in fp32."""

    def __init__(self, channels: int, eps: float, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed values in the dtype of the weight."""
        grouped = x.float().unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(grouped, grouped.shape[-1:], None, self.eps).flatten(-2)
        return (normed * self.weight.float()).to(self.weight.dtype)


class TimeEncoding(nn.Module):
    """Shared relative time encoding: what tells every Mamba mixer where in its text a token is."""

    def __init__(self, config: FusionTreeConfig) -> None:
        super().__init__()
        self.kind, self.channels = config.srte_encoding, config.hidden_size
        if self.kind == "learnable":
            self.weight = nn.Parameter(torch.zeros(config.max_position_embeddings, config.hidden_size))

    def forward(self, positions_BS: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return the encoding ``[B, S, C]``, or None if there is none."""
        if self.kind == "none":
            return None
        if self.kind == "learnable":
            longest = int(positions_BS.max()) + 1
            if longest > self.weight.shape[0]:
                raise ValueError(
                    f"a text of {longest} tokens is longer than max_position_embeddings {self.weight.shape[0]}, where "
                    f"the learnable time encoding ends"
                )
            return F.embedding(positions_BS, self.weight).to(dtype)
        even = torch.arange(0, self.channels, 2, dtype=torch.float64, device=positions_BS.device)
        angle = positions_BS.unsqueeze(-1).double() * torch.exp(even * (-math.log(10000.0) / self.channels))
        return torch.stack([angle.sin().to(dtype), angle.cos().to(dtype)], dim=-1).flatten(2)


class CausalConv(nn.Module):
    """Depthwise causal convolution and SiLU."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, width))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BSC: Tensor, kept: dict[str, Tensor] | None, name: str) -> Tensor:
        """Return ``[B, S, C]``; the inputs before and of the last tokens are read from and kept under ``name``."""
        look_back = self.weight.shape[1] - 1
        before_BKC = x_BSC.new_zeros(x_BSC.shape[0], look_back, x_BSC.shape[2])
        if kept is not None:
            before_BKC = kept.get(name, before_BKC)
        inputs_BTC = torch.cat([before_BKC, x_BSC], dim=1)
        if kept is not None:
            kept[name] = inputs_BTC[:, -look_back:].detach().clone()
        outputs_BCS = F.conv1d(
            inputs_BTC.float().transpose(1, 2),
            self.weight.float().unsqueeze(1),
            self.bias.float(),
            groups=x_BSC.shape[2],
        )
        return F.silu(outputs_BCS).transpose(1, 2).to(x_BSC.dtype)


class SSMParameters(nn.Module):
    """Decay, skip and step bias of the state space heads; kept in fp32, where a decay near one has a meaning."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.dt_bias = nn.Parameter(torch.zeros(heads))


def scan(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSHN: Tensor,
    C_BSHN: Tensor,
    chunk: int,
    state_BHPN: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute ``h_t = exp(A dt_t) h_{t-1} + dt_t B_t x_t`` and ``y_t = C_t h_t``, a chunk of tokens at a time, in fp32.

    Source: Dao and Gu 2024, "Transformers are SSMs", section 6. Cost is linear in the length.

    Returns:
        ``y [B, S, H, P]`` and the state after the last token ``[B, H, P, N]``.
    """
    rows, _, heads, width = x_BSHP.shape
    if state_BHPN is None:
        state_BHPN = x_BSHP.new_zeros(rows, heads, width, B_BSHN.shape[-1])
    outputs = []
    for x, dt, B, C in zip(*(t.split(chunk, dim=1) for t in (x_BSHP, dt_BSH, B_BSHN, C_BSHN)), strict=True):
        log_decay_BHQ = (dt * A_H).cumsum(1).transpose(1, 2)
        # From token s to token q: the decays between them; nothing flows backward.
        between_BHQQ = log_decay_BHQ.unsqueeze(-1) - log_decay_BHQ.unsqueeze(-2)
        causal_QQ = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        between_BHQQ = between_BHQQ.masked_fill(~causal_QQ, float("-inf")).exp()
        scores_BHQQ = torch.einsum("bqhn,bshn->bhqs", C, B) * between_BHQQ
        xdt_BQHP = x * dt.unsqueeze(-1)
        y_BQHP = torch.einsum("bhqs,bshp->bqhp", scores_BHQQ, xdt_BQHP)
        y_BQHP = y_BQHP + torch.einsum("bqhn,bhpn,bhq->bqhp", C, state_BHPN, log_decay_BHQ.exp())
        outputs.append(y_BQHP)
        to_end_BHQ = (log_decay_BHQ[..., -1:] - log_decay_BHQ).exp()
        added_BHPN = torch.einsum("bqhp,bqhn,bhq->bhpn", xdt_BQHP, B, to_end_BHQ)
        state_BHPN = log_decay_BHQ[..., -1].exp()[..., None, None] * state_BHPN + added_BHPN
    return torch.cat(outputs, dim=1), state_BHPN


class Mamba2Mixer(nn.Module):
    """Projections, convolution, scan, gated norm, output projection; B and C have a projection of their own."""

    def __init__(self, config: FusionTreeConfig) -> None:
        super().__init__()
        sizes = config.mamba
        self.head_dim, self.d_state, self.n_groups = sizes["head_dim"], sizes["d_state"], sizes["n_groups"]
        self.chunk_size = sizes["chunk_size"]
        self.d_inner = config.d_inner
        self.heads = self.d_inner // self.head_dim
        bc_channels = 2 * self.n_groups * self.d_state
        self.in_proj = nn.Linear(config.hidden_size, 2 * self.d_inner + self.heads, bias=False)  # z, x, dt
        self.bc_proj = nn.Linear(config.hidden_size, bc_channels, bias=False)  # B, C
        self.conv_x = CausalConv(self.d_inner, sizes["d_conv"])
        self.conv_bc = CausalConv(bc_channels, sizes["d_conv"])
        self.ssm = SSMParameters(self.heads)
        self.norm = RMSNorm(self.d_inner, config.norm_eps, sizes["norm_groups"])
        self.out_proj = nn.Linear(self.d_inner, config.hidden_size, bias=False)

    def forward(self, u_BSC: Tensor, places: Places, kept: dict[str, Tensor] | None) -> Tensor:
        """Mix along the tokens: ``[B, S, C]``."""
        z_BSC, x_BSC, dt_BSH = self.in_proj(u_BSC).split([self.d_inner, self.d_inner, self.heads], dim=-1)
        bc_BSC = self.bc_proj(u_BSC)
        dt_BSH = F.softplus(dt_BSH.float() + self.ssm.dt_bias.float())
        if places.real_BS is not None:
            # Pads look like the nothing before a text: no input to the convolution, no step of the state.
            real_BS1 = places.real_BS.unsqueeze(-1)
            x_BSC, bc_BSC, dt_BSH = x_BSC * real_BS1, bc_BSC * real_BS1, dt_BSH * real_BS1
        x_BSHP = self.conv_x(x_BSC, kept, "conv_x").float().unflatten(-1, (self.heads, self.head_dim))
        B_BSC, C_BSC = self.conv_bc(bc_BSC, kept, "conv_bc").float().chunk(2, dim=-1)
        B_BSHN, C_BSHN = (
            t.unflatten(-1, (self.n_groups, self.d_state)).repeat_interleave(self.heads // self.n_groups, dim=2)
            for t in (B_BSC, C_BSC)
        )
        A_H = -torch.exp(self.ssm.A_log.float())
        state_BHPN = None if kept is None else kept.get("state")
        y_BSHP, state_BHPN = scan(x_BSHP, dt_BSH, A_H, B_BSHN, C_BSHN, self.chunk_size, state_BHPN)
        if kept is not None:
            kept["state"] = state_BHPN.detach()
        y_BSHP = y_BSHP + self.ssm.D.float().unsqueeze(-1) * x_BSHP
        return self.out_proj(self.norm(y_BSHP.flatten(2).to(z_BSC.dtype).float() * F.silu(z_BSC.float())))


def rotate(x_BSHD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
    """Rotate channel i with channel i + D/2 by the tables' angles (rotary position encoding), in fp32."""
    first, second = x_BSHD.float().chunk(2, dim=-1)
    cos, sin = cos_BSD.unsqueeze(2), sin_BSD.unsqueeze(2)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x_BSHD.dtype)


def attend(q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, places: Places, window: int | None) -> Tensor:
    """Attend from each new token to itself and the real tokens before it, within ``window`` tokens (None: all).

    The queries are the last S of the T columns that the keys cover. They are handled in blocks, each with the keys it
    can see, so the cost of a window is linear in the length and no mask is square.
    """
    queries, keys = q_BSHD.shape[1], k_BTKD.shape[1]
    first_key = places.start + queries - keys  # column of the oldest key
    outputs = []
    for begin in range(0, queries, QUERIES_PER_BLOCK):
        end = min(begin + QUERIES_PER_BLOCK, queries)
        high = keys - queries + end
        low = 0 if window is None else max(0, keys - queries + begin - window + 1)
        query_S1 = places.columns_S[begin:end, None]
        key_T = torch.arange(first_key + low, first_key + high, device=q_BSHD.device)
        seen_BST = (key_T <= query_S1) & (key_T >= places.first_B[:, None, None])
        if window is not None:
            seen_BST = seen_BST & (query_S1 - key_T < window)
        seen_BST = seen_BST | (key_T == query_S1)  # a pad sees itself: a softmax over nothing is not a number
        out_BHSD = F.scaled_dot_product_attention(
            q_BSHD[:, begin:end].transpose(1, 2),
            k_BTKD[:, low:high].transpose(1, 2),
            v_BTKD[:, low:high].transpose(1, 2),
            attn_mask=seen_BST.unsqueeze(1),
            enable_gqa=q_BSHD.shape[2] != k_BTKD.shape[2],
        )
        outputs.append(out_BHSD.transpose(1, 2))
    return torch.cat(outputs, dim=1)


class LocalGlobalAttention(nn.Module):
    """Grouped-query attention: local heads first, then global heads; a group of heads is of one kind."""

    def __init__(self, config: FusionTreeConfig, layer: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.window = config.window_of_layer(layer)
        self.local_heads = config.num_heads - config.global_heads
        self.local_kv_heads = self.local_heads * config.num_kv_heads // config.num_heads
        width, hidden = self.head_dim, config.hidden_size
        self.q_proj = nn.Linear(hidden, config.num_heads * width, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_kv_heads * width, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_kv_heads * width, bias=False)
        self.o_proj = nn.Linear(config.num_heads * width, hidden, bias=False)

    def forward(
        self, u_BSC: Tensor, cos_BSD: Tensor, sin_BSD: Tensor, places: Places, kept: dict[str, Tensor] | None
    ) -> Tensor:
        """Mix along the tokens: ``[B, S, C]``."""
        q_BSHD, k_BSKD, v_BSKD = (
            project(u_BSC).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BSHD, k_BSKD = rotate(q_BSHD, cos_BSD, sin_BSD), rotate(k_BSKD, cos_BSD, sin_BSD)
        heads, kv = [self.local_heads, q_BSHD.shape[2] - self.local_heads], self.local_kv_heads
        outputs = []
        for name, window, q, k, v in zip(
            ("local", "global"),
            (self.window, None),
            q_BSHD.split(heads, dim=2),
            (k_BSKD[:, :, :kv], k_BSKD[:, :, kv:]),
            (v_BSKD[:, :, :kv], v_BSKD[:, :, kv:]),
            strict=True,
        ):
            if not q.shape[2]:
                continue
            if kept is not None:
                if f"{name}_k" in kept:
                    k, v = torch.cat([kept[f"{name}_k"], k], dim=1), torch.cat([kept[f"{name}_v"], v], dim=1)
                needed = slice(None) if window is None else slice(max(0, k.shape[1] - window + 1), None)
                kept[f"{name}_k"], kept[f"{name}_v"] = (t[:, needed].detach() for t in (k, v))
            outputs.append(attend(q, k, v, places, window))
        return self.o_proj(torch.cat(outputs, dim=2).flatten(2))


class Alignment(nn.Module):
    """One input for gate and MLP from the mixers' outputs: a two-layer GELU MLP beside a linear map."""

    def __init__(self, branches: int, hidden_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(branches * hidden_size, hidden_size, bias=False)
        self.down = nn.Linear(hidden_size, hidden_size, bias=False)
        self.skip = nn.Linear(branches * hidden_size, hidden_size, bias=False)

    def forward(self, ma_BSC: Tensor) -> Tensor:
        """Return ``[B, S, C]``."""
        return self.down(F.gelu(self.up(ma_BSC))) + self.skip(ma_BSC)


class FusionGate(nn.Module):
    """``sigmoid(W_up tanh(W_down z))``: the share of the Mamba mixer, for every token and channel."""

    def __init__(self, config: FusionTreeConfig) -> None:
        super().__init__()
        self.down = nn.Linear(config.hidden_size, config.gate_rank, bias=False)
        self.up = nn.Linear(config.gate_rank, config.hidden_size, bias=False)

    def forward(self, z_BSC: Tensor) -> Tensor:
        """Return the gates ``[B, S, C]``."""
        return torch.sigmoid(self.up(torch.tanh(self.down(z_BSC))))


class MLP(nn.Module):
    """``down(gelu(up(z)))``, or SwiGLU: ``down(silu(gate(z)) * up(z))``."""

    def __init__(self, config: FusionTreeConfig) -> None:
        super().__init__()
        width = int(config.mlp_ratio * config.hidden_size)
        self.up = nn.Linear(config.hidden_size, width, bias=False)
        self.down = nn.Linear(width, config.hidden_size, bias=False)
        self.gate = nn.Linear(config.hidden_size, width, bias=False) if config.mlp_activation == "swiglu" else None

    def forward(self, z_BSC: Tensor) -> Tensor:
        """Return ``[B, S, C]``."""
        if self.gate is None:
            return self.down(F.gelu(self.up(z_BSC)))
        return self.down(F.silu(self.gate(z_BSC)) * self.up(z_BSC))


class FusionTreeBlock(GradientCheckpointingLayer):
    """One layer. The letter of ``layer_pattern`` says which mixers it has: F both, M Mamba, A attention."""

    def __init__(self, config: FusionTreeConfig, layer: int) -> None:
        super().__init__()
        letter = config.layer_pattern[layer]
        self.has_mamba, self.has_attention = letter in "FM", letter in "FA"
        hidden = config.hidden_size
        self.norm = RMSNorm(hidden, config.norm_eps)
        if self.has_mamba:
            self.mamba = Mamba2Mixer(config)
        if self.has_attention:
            self.attention = LocalGlobalAttention(config, layer)
        branches = self.has_mamba + self.has_attention
        self.align = Alignment(branches, hidden) if config.use_alignment else None
        self.gate = FusionGate(config)
        self.out_proj = nn.Linear(hidden, hidden, bias=False)
        self.mlp = MLP(config)

    def forward(
        self,
        x_BSC: Tensor,
        srte_BSC: Tensor | None,
        cos_BSD: Tensor,
        sin_BSD: Tensor,
        places: Places,
        kept: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the residual stream after this layer; ``kept`` is this layer's part of the cache."""
        u_BSC = self.norm(x_BSC)
        outputs = []
        if self.has_mamba:
            outputs.append(self.mamba(u_BSC if srte_BSC is None else u_BSC + srte_BSC, places, kept))
        if self.has_attention:
            outputs.append(self.attention(u_BSC, cos_BSD, sin_BSD, places, kept))
        m_BSC, a_BSC = outputs[0], outputs[-1]
        # A mixer that does not exist counts as zeros.
        if self.align is not None:
            z_BSC = self.align(torch.cat(outputs, dim=-1))
        else:
            z_BSC = sum(outputs) / 2
        g_BSC = self.gate(z_BSC)
        if self.has_mamba and self.has_attention:
            mixed_BSC = torch.lerp(a_BSC, m_BSC, g_BSC)
        else:
            mixed_BSC = g_BSC * m_BSC if self.has_mamba else (1 - g_BSC) * a_BSC
        return x_BSC + self.out_proj(mixed_BSC) + self.mlp(z_BSC)


class FusionTreePreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the model."""

    config_class = FusionTreeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FusionTreeBlock"]
    _keep_in_fp32_modules_strict = ["ssm"]
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0.0, std)
        elif isinstance(module, RMSNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, CausalConv):
            bound = module.weight.shape[1] ** -0.5
            module.weight.uniform_(-bound, bound)
            module.bias.zero_()
        elif isinstance(module, SSMParameters):
            module.A_log.uniform_(1.0, 16.0).log_()
            module.D.fill_(1.0)
            dt = module.dt_bias.uniform_(math.log(0.001), math.log(0.1)).exp()
            module.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        elif isinstance(module, TimeEncoding) and module.kind == "learnable":
            module.weight.normal_(0.0, std)


class FusionTreeModel(FusionTreePreTrainedModel):
    """Embedding, blocks, norm."""

    def __init__(self, config: FusionTreeConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(FusionTreeBlock(config, layer) for layer in range(config.num_layers))
        self.srte = TimeEncoding(config)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.embed = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: FusionTreeCache | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Return the normed hidden states.

        Args:
            input_ids: tokens ``[B, S]``.
            attention_mask: 1 on real tokens, 0 on pads; one run of real tokens a row.
            past_key_values: cache of an earlier call that the tokens continue; updated in place.
            inputs_embeds: embedded tokens instead of ``input_ids``.
            position_ids: not needed; if given, they must be those of one text a row.
            use_cache: return a cache.
            output_hidden_states: return the residual stream before every layer and at the end, too.
            return_dict: False returns a tuple.
            kwargs: not used.

        Raises:
            ValueError: packed rows, which this file cannot keep apart, or a mask that it cannot read.
        """
        packed = [name for name in PACKED if kwargs.get(name) is not None]
        if packed:
            raise ValueError(f"{packed[0]} marks several texts in a row; give each text a row of its own")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BSC = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if self.gradient_checkpointing and self.training:
            use_cache = False  # recomputation would update a cache twice
        cache = past_key_values
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = FusionTreeCache(self.config.num_layers)
        elif cache is not None and not isinstance(cache, FusionTreeCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}; pass what an earlier call returned")
        places = Places(x_BSC.shape[0], x_BSC.shape[1], attention_mask, cache, x_BSC.device)
        if position_ids is not None and not bool((position_ids == places.positions_BS)[places.real_or_all].all()):
            raise ValueError("position_ids are not those of one text a row; give each text a row of its own")
        exponent_D = torch.arange(0, self.config.head_dim, 2, dtype=torch.float64, device=x_BSC.device)
        angles_BSD = places.positions_BS.unsqueeze(-1).double() * self.config.rope_theta ** (
            -exponent_D / self.config.head_dim
        )
        cos_BSD, sin_BSD = angles_BSD.cos().float(), angles_BSD.sin().float()
        srte_BSC = self.srte(places.positions_BS, x_BSC.dtype)
        streams = []
        for layer, block in enumerate(self.layers):
            streams.append(x_BSC)
            x_BSC = block(x_BSC, srte_BSC, cos_BSD, sin_BSD, places, None if cache is None else cache.layers[layer])
        x_BSC = self.norm(x_BSC)
        if cache is not None:
            cache.columns += x_BSC.shape[1]
        output = BaseModelOutputWithPast(
            last_hidden_state=x_BSC,
            past_key_values=cache,
            hidden_states=(*streams, x_BSC) if output_hidden_states else None,
        )
        return output if return_dict is not False else output.to_tuple()


class FusionTreeForCausalLM(FusionTreePreTrainedModel, GenerationMixin):
    """The language model: hidden states, head, loss."""

    _tied_weights_keys = {"lm_head.weight": "model.embed.weight"}

    def __init__(self, config: FusionTreeConfig) -> None:
        super().__init__(config)
        self.model = FusionTreeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.model.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.model.embed = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.lm_head = new_embeddings

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first forward makes a FusionTreeCache

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: FusionTreeCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Give the forward the tokens that its cache has not seen."""
        inputs: dict[str, Any] = {
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": 1 if logits_to_keep is None else logits_to_keep,
        }
        if past_key_values is not None:
            # With inputs_embeds, input_ids holds the new tokens alone.
            new = (attention_mask if attention_mask is not None else input_ids).shape[1] - past_key_values.columns
            return {"input_ids": input_ids[:, -max(1, new) :], **inputs}
        if inputs_embeds is not None:
            return {"inputs_embeds": inputs_embeds, **inputs}
        return {"input_ids": input_ids, **inputs}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: FusionTreeCache | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Return logits, and with ``labels`` (the input tokens; -100 where none counts) their mean loss.

        ``logits_to_keep`` is the number of last tokens that get logits; 0 means all. The other arguments are those of
        :class:`FusionTreeModel`.
        """
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **{name: kwargs.pop(name) for name in PACKED if name in kwargs},
        )
        hidden_BSC = output.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden_BSC = hidden_BSC[:, logits_to_keep]
        elif logits_to_keep:
            hidden_BSC = hidden_BSC[:, -logits_to_keep:]
        logits_BSV = self.lm_head(hidden_BSC)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BSV, labels, vocab_size=self.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BSV,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )
        return result if return_dict is not False else result.to_tuple()


__all__ = ["FusionTreeForCausalLM", "FusionTreeModel", "FusionTreePreTrainedModel"]
