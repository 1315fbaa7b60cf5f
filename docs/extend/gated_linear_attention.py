"""Gated linear attention (Yang et al. 2023, "Gated Linear Attention Transformers", section 4) as a mixer.

Each head keeps a state, a matrix of K keys and V values. A token multiplies every row of it by a decay between 0 and 1,
adds the product of its key and value, and reads it with its query:

    state_t = decay_t state_{t-1} + k_t v_t        y_t = q_t state_t

Shape legend: B rows, S tokens (c: of one scan chunk), C channels, H heads, K key and V value channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusiontree.models.config import ModelConfig
from fusiontree.models.mixers import MIXERS
from fusiontree.models.mixers.base import Activations, ContextTools, Fp32Parameters, Mixer, MixerInputs
from fusiontree.models.mixers.cache import StateCache
from fusiontree.models.mixers.split import Block, Split, column, row
from fusiontree.models.norm import GatedRMSNorm
from fusiontree.utils.settings import Section, setting


# step 1: settings
class GLAConfig(Section):
    """Gated linear attention."""

    heads: int = setting(4, "Heads; a multiple of tp.", ge=1)
    key_dim: int = setting(32, "Key channels per head: rows of the state.", unit="channels", ge=1)
    value_dim: int = setting(64, "Value channels per head: columns of the state.", unit="channels", ge=1)
    decay_range: list[float] = setting(
        [0.9, 0.999], "Range of the initial decay per token.", min_length=2, max_length=2
    )
    chunk_size: int = setting(16, "Tokens per scan chunk; does not change the result.", unit="tokens", ge=1)


# step 2: the computation
def scan(
    q_BSHK: Tensor, k_BSHK: Tensor, v_BSHV: Tensor, log_decay_BSHK: Tensor, segments_BS: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the recurrence from a state of zero; the state restarts where ``segments_BS`` increases.

    Returns:
        The outputs ``[B, S, H, V]``, the final state ``[B, H, K, V]``, and the decay of a nonzero initial state up to
        each token, ``[B, S, H, K]``: 0 from the first document start on.
    """
    outputs, state_BHKV = [], q_BSHK.new_zeros(*k_BSHK[:, 0].shape, v_BSHV.shape[-1])
    carry_BHK, carries = torch.ones_like(q_BSHK[:, 0]), []
    previous_B = torch.zeros_like(segments_BS[:, 0])
    parts = (tensor.split(chunk_size, dim=1) for tensor in (q_BSHK, k_BSHK, v_BSHV, log_decay_BSHK, segments_BS))
    for q, k, v, log_decay, segments in zip(*parts, strict=True):
        cumulative = log_decay.cumsum(1)  # logarithm of the decay from the chunk's start to each token
        same_document = (segments[:, :, None] == segments[:, None, :]).tril()[..., None, None]  # [B, query, key, 1, 1]
        pair_decay = (cumulative[:, :, None] - cumulative[:, None, :]).masked_fill(~same_document, -math.inf).exp()
        scores = torch.einsum("bihk,bjhk,bijhk->bijh", q, k, pair_decay)
        continues = (segments == previous_B[:, None])[..., None, None]
        decay = torch.where(continues, cumulative.exp(), 0.0)  # decay of the state before the chunk
        y = torch.einsum("bijh,bjhv->bihv", scores, v) + torch.einsum("bihk,bhkv->bihv", q * decay, state_BHKV)
        state_BHKV = state_BHKV * decay[:, -1, :, :, None]
        state_BHKV = state_BHKV + torch.einsum("bjhk,bjhv->bhkv", k * pair_decay[:, -1], v)
        carries.append(carry_BHK[:, None] * decay)
        carry_BHK, previous_B = carries[-1][:, -1], segments[:, -1]
        outputs.append(y)
    return torch.cat(outputs, 1), state_BHKV, torch.cat(carries, 1)


class Decay(Fp32Parameters):
    """Decay per head and key channel. Its bias is a logit: bfloat16 would change 1 - decay by up to 1.6% at 0.999."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, logits_BSC: Tensor) -> Tensor:
        """Return the logarithm of the decay, ``[B, S, H*K]``, in fp32."""
        return F.logsigmoid(logits_BSC.float() + self.bias.float())


# step 3: the mixer
class GatedLinearAttention(Mixer):
    """Projections, scan, gated norm per head, output projection; any number of heads, so that tp can split them."""

    name: ClassVar[str] = "gla"
    module_name: ClassVar[str] = "gla"
    settings: ClassVar[type[Section] | None] = GLAConfig
    adds_time_encoding: ClassVar[bool] = True
    state_exchange: Callable[[Tensor, Tensor], Tensor] | None = None

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        sizes, hidden = self.section(config), config.hidden_size
        keys, values = sizes.heads * sizes.key_dim, sizes.heads * sizes.value_dim
        self.key_dim, self.value_dim, self.chunk_size = sizes.key_dim, sizes.value_dim, sizes.chunk_size
        self.q_proj = nn.Linear(hidden, keys, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, values, bias=False)
        self.decay_proj = nn.Linear(hidden, keys, bias=False)
        self.gate_proj = nn.Linear(hidden, values, bias=False)
        self.decay = Decay(keys)
        self.norm = GatedRMSNorm(values, sizes.heads, config.norm_eps, config.kernels.elementwise)
        self.out_proj = nn.Linear(values, hidden, bias=False)

    def forward(self, u_BSC: Tensor, inputs: MixerInputs, cache: StateCache | None = None) -> Tensor:
        """Mix along the tokens; ``cache`` keeps the state."""
        log_decay_BSC = self.decay(self.decay_proj(u_BSC))
        k_BSC, v_BSC = self.k_proj(u_BSC).float(), self.v_proj(u_BSC).float()
        segments_BS = torch.zeros(u_BSC.shape[:2], dtype=torch.int32, device=u_BSC.device)
        if inputs.documents is not None:
            segments_BS = inputs.documents.segments_BS
        if inputs.padding_mask_BS is not None:  # pads neither decay the state nor add to it
            log_decay_BSC = log_decay_BSC * inputs.padding_mask_BS[..., None]
            k_BSC = k_BSC * inputs.padding_mask_BS[..., None]
        q_BSHK, k_BSHK, log_decay_BSHK = (
            x.unflatten(-1, (-1, self.key_dim)) for x in (self.q_proj(u_BSC).float(), k_BSC, log_decay_BSC)
        )
        q_BSHK = q_BSHK * self.key_dim**-0.5
        v_BSHV = v_BSC.unflatten(-1, (-1, self.value_dim))
        y_BSHV, state_BHKV, carry_BSHK = scan(q_BSHK, k_BSHK, v_BSHV, log_decay_BSHK, segments_BS, self.chunk_size)
        initial_BHKV = None
        if cache is not None and cache.previous():
            (initial_BHKV,) = cache.previous()
        elif self.state_exchange is not None:
            initial_BHKV = self.state_exchange(state_BHKV, carry_BSHK[:, -1])
        if initial_BHKV is not None:
            y_BSHV = y_BSHV + torch.einsum("bshk,bhkv->bshv", q_BSHK * carry_BSHK, initial_BHKV)
            state_BHKV = state_BHKV + carry_BSHK[:, -1, :, :, None] * initial_BHKV
        if cache is not None:
            cache.store(state_BHKV)
        return self.out_proj(self.norm(y_BSHV.flatten(2).to(u_BSC.dtype), self.gate_proj(u_BSC)))

    # step 4: parallelism
    @classmethod
    def tp_plan(cls, config: ModelConfig) -> dict[str, Split]:
        """Split by heads: the inputs of ``out_proj``, and the outputs of all other projections."""
        sizes = cls.section(config)
        keys = Block("keys", sizes.heads * sizes.key_dim, sizes.heads)
        values = Block("values", sizes.heads * sizes.value_dim, sizes.heads)
        return {
            "q_proj.weight": column(keys),
            "k_proj.weight": column(keys),
            "v_proj.weight": column(values),
            "decay_proj.weight": column(keys),
            "gate_proj.weight": column(values),
            "decay.bias": column(keys),
            "norm.weight": column(values),
            "out_proj.weight": row(values),
        }

    @classmethod
    def tp_problems(cls, config: ModelConfig, tp: int) -> Iterator[str]:
        """Yield a problem if ``tp`` does not divide the heads."""
        if cls.section(config).heads % tp:
            yield f"mixers.gla.heads {cls.section(config).heads} do not divide by {tp}"

    def use_context_parallel(self, tools: ContextTools) -> None:
        """Pass the state from chunk to chunk."""
        self.state_exchange = tools.state_exchange

    @classmethod
    def exchanged_bytes(cls, config: ModelConfig, layer: int, tokens: float, cp: int, tp: int, itemsize: int) -> float:
        """Return the bytes of the states and decays of all chunks, in fp32."""
        sizes = cls.section(config)
        return 4 * cp * sizes.heads * sizes.key_dim * (sizes.value_dim + 1) / tp

    # step 5: initial values and size checks
    @classmethod
    def initial_values(
        cls, name: str, shape: tuple[int, ...], config: ModelConfig, generator: torch.Generator
    ) -> Tensor | None:
        """Draw 1 - decay log-uniformly, so that key channels have different memory lengths."""
        if name != "decay.bias":
            return None
        low, high = (math.log(1 - decay) for decay in cls.section(config).decay_range)
        forget = torch.empty(shape, dtype=torch.float64).uniform_(high, low, generator=generator).exp()
        return torch.logit(1 - forget).float()

    @classmethod
    def size_problems(cls, config: ModelConfig) -> Iterator[str]:
        """Yield a problem if the range of decays is not within 0 and 1."""
        low, high = cls.section(config).decay_range
        if not 0 < low <= high < 1:
            yield f"decay_range is [{low}, {high}]; it needs 0 < low <= high < 1"

    # step 6: costs
    @classmethod
    def flops(cls, config: ModelConfig, layer: int, lengths: Sequence[int]) -> float:
        """Return the recurrence's FLOPs: per state element, 1 for the decay, 2 for the update and 2 for the readout."""
        sizes = cls.section(config)
        return 5.0 * sizes.heads * sizes.key_dim * sizes.value_dim

    @classmethod
    def activations(cls, config: ModelConfig, tp: int) -> Activations:
        """Count what autograd keeps, in 16-bit elements; tensors of the scan are fp32 and count twice."""
        sizes = cls.section(config)
        keys, values = sizes.heads * sizes.key_dim / tp, sizes.heads * sizes.value_dim / tp
        pair_decays = 2 * sizes.chunk_size * keys
        states = keys * sizes.value_dim / sizes.chunk_size
        return Activations(3 * keys + 2 * values + 2 * (12 * keys + 3 * values + pair_decays + states), values)

    # step 7: decoding
    @classmethod
    def new_cache(cls, config: ModelConfig, layer: int, capacity: int, dtype: torch.dtype) -> StateCache:
        """Return a cache of the state, ``[B, H, K, V]`` in fp32."""
        return StateCache()


MIXERS.register(GatedLinearAttention.name, GatedLinearAttention)
