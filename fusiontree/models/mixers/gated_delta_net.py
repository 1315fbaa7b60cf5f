"""Gated DeltaNet mixer (Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464), with the sizes of Qwen3-Next's layers.

Shape legend: B rows, S tokens, G key heads of K channels, H value heads of V channels, C channels (of the model, or H*V
of the mixer), L width of the convolution less one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import ClassVar, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from fusiontree.models.config import ModelConfig
from fusiontree.models.mixers import MIXERS
from fusiontree.models.mixers.base import HALF, Activations, ContextTools, Fp32Parameters, Mixer, MixerInputs, Seconds
from fusiontree.models.mixers.cache import StateCache
from fusiontree.models.mixers.recurrent import CausalConv, drawn_decay, drawn_step_bias, drawn_taps, last_inputs
from fusiontree.models.mixers.split import Block, Split, column, row
from fusiontree.ops.elementwise import fused
from fusiontree.ops.gated_delta import AffineExchange, gated_delta_rule
from fusiontree.ops.gated_delta.fla import WIDEST_KEY
from fusiontree.ops.gated_delta.formulas import decay_and_beta, norm_then_gate, unit_length
from fusiontree.ops.linear import project
from fusiontree.ops.linear.side_by_side import product_in
from fusiontree.ops.recompute import recomputed
from fusiontree.utils.settings import Section, check_positive_ranges, setting

_KEPT_CHUNK = 64
"""Tokens of a scan chunk of fla's kernels, which keep a matrix of as many columns per token and value head."""
_BYTES_PER_S = 2.7e12
"""Rate at which an H100's memory is read and written."""


class GatedDeltaNetConfig(Section):
    """The Gated DeltaNet mixer."""

    key_dim: int = setting(128, "Channels of a query or key head: rows of the state.", unit="channels", ge=1)
    value_dim: int = setting(128, "Channels of a value head: columns of the state.", unit="channels", ge=1)
    expand: float = setting(2.0, "Width of all value heads as a multiple of hidden_size.", gt=0)
    heads_per_key: int = setting(2, "Consecutive value heads that share a query and key head.", ge=1)
    d_conv: int = setting(4, "Width of the causal convolution, this token included.", unit="tokens", ge=2)
    chunk_size: int = setting(
        64,
        "Tokens per scan chunk; kernels.gated_delta=fla ignores it. Does not change the result.",
        unit="tokens",
        ge=1,
    )
    A_init_range: list[float] = setting(
        [0.01, 16.0], "Range from which the decay rate per step is drawn.", min_length=2, max_length=2
    )
    dt_init_range: list[float] = setting(
        [0.001, 0.1], "Range of the initial step size, log-uniform.", min_length=2, max_length=2
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_positive_ranges(self, "A_init_range", "dt_init_range")
        return self


class Decay(Fp32Parameters):
    """Decay and writing strength of each value head; the parameters are always in fp32."""

    def __init__(self, heads: int, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))

    def forward(self, a_BSH: Tensor, b_BSH: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithm of the decay and the writing strength, ``[B, S, H]`` each, in fp32 or better."""
        A_log_H, dt_bias_H = (p.float() if p.dtype in HALF else p for p in (self.A_log, self.dt_bias))
        return fused(decay_and_beta, self.backend, a_BSH.device.type)(a_BSH, b_BSH, A_log_H, dt_bias_H)


class HeadNorm(nn.Module):
    """RMS norm of each value head, then the gate ``silu(z)``; a weight per channel, so that heads can be split."""

    def __init__(self, channels: int, eps: float, backend: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.eps, self.backend = eps, backend

    def forward(self, y_BSHV: Tensor, z_BSC: Tensor) -> Tensor:
        """Return ``[B, S, C]``."""
        formula = fused(norm_then_gate, self.backend, y_BSHV.device.type)
        return recomputed(partial(formula, eps=self.eps), y_BSHV, z_BSC, self.weight)


class GatedDeltaNet(Mixer):
    """Projections, convolutions, gated delta rule, gated norm, output projection.

    The numbers of heads are derived from the projections' outputs, so the same code runs on a tensor parallel rank's
    share of the heads. Context parallelism sets ``left_context``, which returns the inputs of both convolutions and the
    tokens before this rank's chunk, and ``state_exchange``; see :func:`fusiontree.ops.gated_delta.gated_delta_rule`.
    """

    name: ClassVar[str] = "gated_delta_net"
    module_name: ClassVar[str] = "delta"
    settings: ClassVar[type[Section] | None] = GatedDeltaNetConfig
    adds_time_encoding: ClassVar[bool] = True
    no_decay: ClassVar[tuple[str, ...]] = ("decay.A_log", "decay.dt_bias")
    output_projection: ClassVar[str] = "out_proj"
    fp8_products: ClassVar[dict[str, str]] = {"in_proj": "mixer_in", "out_proj": "mixer_out"}
    fused_projections = False
    left_context: Callable[[Sequence[Tensor], int], tuple[Sequence[Tensor], Sequence[Tensor]]] | None = None
    state_exchange: AffineExchange | None = None

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__(config, layer)
        sizes, kernels, hidden = self.section(config), config.kernels, config.hidden_size
        heads, key_heads = _heads(config)
        keys, values = 2 * key_heads * sizes.key_dim, heads * sizes.value_dim
        self.key_dim, self.value_dim, self.look_back = sizes.key_dim, sizes.value_dim, sizes.d_conv - 1
        self.in_proj = nn.Linear(hidden, 2 * values + 2 * heads, bias=False)
        self.qk_proj = nn.Linear(hidden, keys, bias=False)
        self.conv_v = CausalConv(values, sizes.d_conv, kernels.conv)
        self.conv_qk = CausalConv(keys, sizes.d_conv, kernels.conv)
        self.decay = Decay(heads, kernels.elementwise)
        self.chunk_size, self.backend, self.scan_backend = sizes.chunk_size, kernels.elementwise, kernels.gated_delta
        self.norm = HeadNorm(values, config.norm_eps, kernels.elementwise)
        self.out_proj = nn.Linear(values, hidden, bias=False)

    def forward(self, u_BSC: Tensor, inputs: MixerInputs, cache: StateCache | None = None) -> Tensor:
        """Mix along the tokens; ``cache`` keeps the inputs of both convolutions and the state."""
        documents = inputs.documents
        cut = partial(_in_proj_sizes, value_dim=self.value_dim)
        *zvab, qk_BSC = project(u_BSC, (self.in_proj, self.qk_proj), joint=self.fused_projections, cuts=(cut, None))
        z_BSC, v_BSC, a_BSH, b_BSH = zvab if len(zvab) == 4 else zvab[0].split(cut(zvab[0].shape[-1]), dim=-1)
        log_decay_BSH, beta_BSH = self.decay(a_BSH, b_BSH)
        initial_v_BLC = initial_qk_BLC = initial_state_BHKV = None
        if cache is not None:
            initial_v_BLC, initial_qk_BLC, initial_state_BHKV = cache.previous() or (None, None, None)
        elif self.left_context is not None:
            (v_BSC, qk_BSC), (initial_v_BLC, initial_qk_BLC) = self.left_context((v_BSC, qk_BSC), self.look_back)
        v_BSHV = self.conv_v(v_BSC, documents, initial_v_BLC).unflatten(-1, (-1, self.value_dim))
        qk_BSGK = self.conv_qk(qk_BSC, documents, initial_qk_BLC).unflatten(-1, (-1, self.key_dim))
        unit = fused(unit_length, self.backend, u_BSC.device.type)
        q_BSGK, k_BSGK = (recomputed(unit, part) for part in qk_BSGK.chunk(2, dim=2))
        y_BSHV, state_BHKV = gated_delta_rule(
            q_BSGK,
            k_BSGK,
            v_BSHV,
            log_decay_BSH,
            beta_BSH,
            chunk_size=self.chunk_size,
            documents=documents,
            initial_state_BHKV=initial_state_BHKV,
            state_exchange=None if cache is not None else self.state_exchange,
            backend=self.scan_backend,
        )
        if cache is not None:
            mask_BS = inputs.padding_mask_BS
            last_v_BLC = last_inputs(initial_v_BLC, v_BSC, self.look_back, mask_BS)
            cache.store(last_v_BLC, last_inputs(initial_qk_BLC, qk_BSC, self.look_back, mask_BS), state_BHKV)
        return product_in(self.norm(y_BSHV, z_BSC), self.out_proj, inputs.place_BSC)

    def bf16_rows(self, product: str, rows: int) -> int:
        """Keep the inputs of decay and beta in bf16; they decide what a state keeps."""
        return sum(_in_proj_sizes(rows, self.value_dim)[-2:]) if product == "in_proj" else 0

    @classmethod
    def size_problems(cls, config: ModelConfig) -> Iterator[str]:
        """Yield a problem if no whole number of heads fits, or fla's kernels, chosen by name, have no such keys."""
        sizes = cls.section(config)
        if config.kernels.gated_delta == "fla" and sizes.key_dim > WIDEST_KEY:
            limit = f"{WIDEST_KEY} channels that model.kernels.gated_delta=fla allows"
            yield f"key_dim {sizes.key_dim} is above the {limit}; lower it, or set model.kernels.gated_delta=chunked"
        exact = sizes.expand * config.hidden_size / sizes.value_dim
        heads = max(round(exact), 1)
        if abs(exact - heads) > 1e-9 * heads:  # 1.12 * 400 / 16 is 28, and a little more in floating point
            yield (
                f"expand {sizes.expand} * hidden_size {config.hidden_size} is not a multiple of value_dim "
                f"{sizes.value_dim}; {heads} heads need expand {heads * sizes.value_dim / config.hidden_size!r}"
            )
        elif heads % sizes.heads_per_key:
            yield (
                f"{heads} value heads (expand * hidden_size / value_dim) do not divide by heads_per_key "
                f"{sizes.heads_per_key}; use one of {[n for n in range(1, heads + 1) if heads % n == 0]}"
            )

    @classmethod
    def tp_plan(cls, config: ModelConfig) -> dict[str, Split]:
        """Split value heads, and the query and key heads that they share."""
        sizes = cls.section(config)
        heads, key_heads = _heads(config)
        values, keys = heads * sizes.value_dim, key_heads * sizes.key_dim
        v, per_head = Block("value", values, heads), column(Block("a", heads, heads))
        # Names that differ from those of attention's blocks, which a layer may have, too.
        qk = column(Block("query", keys, key_heads), Block("key", keys, key_heads))
        return {
            "in_proj.weight": column(Block("z", values, heads), v, Block("a", heads, heads), Block("b", heads, heads)),
            "qk_proj.weight": qk,
            "conv_v.weight": column(v),
            "conv_v.bias": column(v),
            "conv_qk.weight": qk,
            "conv_qk.bias": qk,
            "decay.A_log": per_head,
            "decay.dt_bias": per_head,
            "norm.weight": column(v),
            "out_proj.weight": row(v),
        }

    @classmethod
    def tp_problems(cls, config: ModelConfig, tp: int) -> Iterator[str]:
        """Yield the reasons why the heads cannot be split over ``tp`` ranks."""
        heads, key_heads = _heads(config)
        if heads % tp:
            yield f"{heads} value heads (expand * hidden_size / value_dim) do not divide by {tp}"
        if key_heads % tp and tp % key_heads:
            yield f"{key_heads} key heads (value heads / heads_per_key) are neither a multiple nor a divisor of {tp}"

    def use_context_parallel(self, tools: ContextTools) -> None:
        """Exchange states between chunks, and give the convolutions their left context."""
        self.state_exchange = tools.affine_exchange
        self.left_context = tools.left_context

    @classmethod
    def exchanged_bytes(cls, config: ModelConfig, layer: int, tokens: float, cp: int, tp: int, itemsize: int) -> float:
        """Return the bytes of the states and matrices of all chunks, in fp32."""
        sizes = cls.section(config)
        return 4 * cp * _heads(config)[0] / tp * sizes.key_dim * (sizes.value_dim + sizes.key_dim)

    @classmethod
    def initial_values(
        cls, name: str, shape: tuple[int, ...], config: ModelConfig, generator: torch.Generator
    ) -> Tensor | None:
        """Draw ``A_log`` and ``dt_bias`` from their configured ranges, convolutions within 1/sqrt(width).

        ``A_log`` is the logarithm of a uniform draw from ``A_init_range``, ``dt_bias`` the inverse softplus of a
        log-uniform draw from ``dt_init_range``.
        """
        sizes = cls.section(config)
        if name == "decay.A_log":
            return drawn_decay(shape, sizes.A_init_range, generator)
        if name == "decay.dt_bias":
            return drawn_step_bias(shape, sizes.dt_init_range, generator)
        if name in ("conv_v.weight", "conv_qk.weight"):
            return drawn_taps(shape, generator)
        return None

    @classmethod
    def flops(cls, config: ModelConfig, layer: int, lengths: Sequence[int]) -> float:
        """Return 7 per state element (decay, recall, write, read) and ``2 width`` per channel of the convolutions."""
        sizes = cls.section(config)
        heads, key_heads = _heads(config)
        channels = heads * sizes.value_dim + 2 * key_heads * sizes.key_dim
        return 7.0 * heads * sizes.key_dim * sizes.value_dim + 2.0 * sizes.d_conv * channels

    @classmethod
    def activations(cls, config: ModelConfig, tp: int) -> Activations:
        """Count projections, scan output and what fla's kernels keep; convolutions, unit vectors and norm are cheap."""
        sizes = cls.section(config)
        heads, key_heads = _heads(config)
        values, qk = heads * sizes.value_dim / tp, 2 * key_heads * sizes.key_dim / min(tp, key_heads)
        projected = 2 * values + 2 * heads / tp + qk
        per_head = _KEPT_CHUNK + 4 * 2  # a matrix in 16 bits; decay, its sum and beta twice in fp32
        return Activations(projected + values + per_head * heads / tp, 2 * values + 2 * qk)

    @classmethod
    def seconds(cls, config: ModelConfig, layer: int, length: int) -> Seconds:
        """Return an estimate, not a measurement: what fla's kernels read and write in 16 bits, at the memory's rate.

        Forward and backward, per token and value head: 25 vectors as long as a key, 21 as long as a value, 8 rows of
        matrices between a chunk's tokens, and 6 times the chunk's part of the states.
        """
        sizes = cls.section(config)
        K, V = sizes.key_dim, sizes.value_dim
        elements = 25 * K + 21 * V + 8 * _KEPT_CHUNK + 6 * K * V / _KEPT_CHUNK
        return Seconds(kept=0.0, repeated=2 * elements * _heads(config)[0] / _BYTES_PER_S)

    @classmethod
    def new_cache(cls, config: ModelConfig, layer: int, capacity: int, dtype: torch.dtype) -> StateCache:
        """Return a cache of the last ``d_conv - 1`` inputs of each convolution and the state, ``[B, H, K, V]``."""
        return StateCache()


def _heads(config: ModelConfig) -> tuple[int, int]:
    """Return the number of value heads and of key heads."""
    sizes = GatedDeltaNet.section(config)
    heads = round(sizes.expand * config.hidden_size / sizes.value_dim)
    return heads, heads // sizes.heads_per_key


def _in_proj_sizes(rows: int, value_dim: int) -> list[int]:
    """Return how many of ``rows`` outputs of ``in_proj`` are z, v, a and b, for any number of heads."""
    heads = rows // (2 * value_dim + 2)
    return [heads * value_dim, heads * value_dim, heads, heads]


MIXERS.register(GatedDeltaNet.name, GatedDeltaNet)
