"""Mamba-2 mixer (Dao and Gu 2024, "Transformers are SSMs", section 7), with a separate projection for B and C.

Shape legend: B rows, S tokens, H state space heads, P channels of a head, G groups of B and C, N size of the state,
C channels (of the model, or H*P of the mixer), K width of the convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusiontree.models.config import ModelConfig
from fusiontree.models.mixers import MIXERS
from fusiontree.models.mixers.base import HALF, Activations, ContextTools, Fp32Parameters, Mixer, MixerInputs, Seconds
from fusiontree.models.mixers.cache import StateCache
from fusiontree.models.mixers.recurrent import CausalConv, drawn_decay, drawn_step_bias, drawn_taps, last_inputs
from fusiontree.models.mixers.split import Block, Split, column, row
from fusiontree.models.norm import GatedRMSNorm
from fusiontree.ops.documents import Documents
from fusiontree.ops.elementwise import fused
from fusiontree.ops.halves import halves
from fusiontree.ops.linear import project
from fusiontree.ops.linear.side_by_side import product_in
from fusiontree.ops.ssd import StateExchange, ssd_scan
from fusiontree.ops.step import has_kernels

_SCAN_S = 53e-3 / (16 * 32768 * 4096)
"""Seconds per token, layer and inner channel, forward and backward: one H100, hybrid_1b_32k (docs/speed.md)."""
_SCAN_CHUNK = 128
"""Tokens between two states that the scan keeps for its backward pass (heads of 64 channels, 16 bits)."""


class SSMValues(NamedTuple):
    """A, D and step sizes for the scan, in fp32."""

    A_H: Tensor
    """Decay rates, negative."""
    D_H: Tensor
    """Skip weights."""
    dt_BSH: Tensor
    """Step sizes, positive."""


class SSMParameters(Fp32Parameters):
    """Decay, skip and step bias of the state space heads, always in fp32."""

    def __init__(
        self, heads: int, backend: str = "auto", dt_min: float | None = None, dt_max: float | None = None
    ) -> None:
        super().__init__()
        self.backend = backend
        self.dt_min, self.dt_max = dt_min, dt_max
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))

    def forward(self, dt_BSH: Tensor) -> SSMValues:
        """Return ``A = -exp(A_log)``, ``D`` and the step sizes ``softplus(dt + dt_bias)`` within their limits.

        The projected dt comes in here, not the bias out: a module without arguments makes torch 2.11's FSDP2 fail
        when a checkpointed block is recomputed on a GPU.
        """
        parameters = (_at_least_fp32(p) for p in (self.A_log, self.D, self.dt_bias))
        decoding = dt_BSH.shape[1] == 1 and not torch.is_grad_enabled()  # decoding: launches of small kernels dominate
        values = fused(_ssm_values, self.backend, dt_BSH.device.type) if decoding else _ssm_values
        A_H, D_H, step_BSH = values(dt_BSH, *parameters)
        if self.dt_min is not None or self.dt_max is not None:
            step_BSH = step_BSH.clamp(self.dt_min, self.dt_max)
        return SSMValues(A_H, D_H, step_BSH)


def _ssm_values(dt_BSH: Tensor, A_log_H: Tensor, D_H: Tensor, dt_bias_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # A copy of D: an engine that shards parameters frees them when the forward ends.
    return -torch.exp(A_log_H), D_H.clone(), F.softplus(dt_BSH.to(dt_bias_H.dtype) + dt_bias_H)


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALF else tensor


class Mamba2Mixer(Mixer):
    """Projections, convolution, scan, gated norm, output projection.

    The numbers of heads and groups are derived from the projections' outputs, so the same code runs on a tensor
    parallel rank's share of the heads.

    Context parallelism sets two functions. ``left_context(inputs, n)`` takes the inputs of both convolutions and
    returns them (use these; they carry the gradient) and, for each, the ``n`` tokens that precede this rank's chunk.
    ``state_exchange`` returns the state before this rank's chunk; see :func:`fusiontree.ops.ssd.ssd_scan`.
    """

    name: ClassVar[str] = "mamba2"
    module_name: ClassVar[str] = "mamba"
    adds_time_encoding: ClassVar[bool] = True
    no_decay: ClassVar[tuple[str, ...]] = ("ssm.A_log", "ssm.D", "ssm.dt_bias")
    output_projection: ClassVar[str] = "out_proj"
    fp8_products: ClassVar[dict[str, str]] = {"in_proj": "mixer_in", "out_proj": "mixer_out"}
    fused_projections = False
    left_context: Callable[[Sequence[Tensor], int], tuple[Sequence[Tensor], Sequence[Tensor]]] | None = None
    state_exchange: StateExchange | None = None

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__(config, layer)
        sizes, kernels = config.mamba, config.kernels
        bc_channels = 2 * sizes.n_groups * sizes.d_state
        self.head_dim, self.d_state, self.look_back = sizes.head_dim, sizes.d_state, sizes.d_conv - 1
        self.in_proj = nn.Linear(config.hidden_size, 2 * config.d_inner + config.mamba_heads, bias=False)
        self.bc_proj = nn.Linear(config.hidden_size, bc_channels, bias=False)
        self.conv_x = CausalConv(config.d_inner, sizes.d_conv, kernels.conv)
        self.conv_bc = CausalConv(bc_channels, sizes.d_conv, kernels.conv)
        self.ssm = SSMParameters(config.mamba_heads, kernels.elementwise, sizes.dt_min, sizes.dt_max)
        self.chunk_size, self.scan_backend = sizes.chunk_size, kernels.ssd
        self.norm = GatedRMSNorm(config.d_inner, sizes.norm_groups, config.norm_eps, config.kernels.elementwise)
        self.out_proj = nn.Linear(config.d_inner, config.hidden_size, bias=False)

    def forward(self, u_BSC: Tensor, inputs: MixerInputs, cache: StateCache | None = None) -> Tensor:
        """Mix along the tokens; ``cache`` keeps the inputs of both convolutions and the state."""
        cut = partial(_in_proj_sizes, head_dim=self.head_dim)
        *zxdt, bc_BSC = project(u_BSC, (self.in_proj, self.bc_proj), joint=self.fused_projections, cuts=(cut, None))
        z_BSC, x_BSC, dt_BSH = zxdt if len(zxdt) == 3 else zxdt[0].split(cut(zxdt[0].shape[-1]), dim=-1)
        mixed_BSC = self._mix(z_BSC, x_BSC, dt_BSH, bc_BSC, inputs, cache)
        return product_in(mixed_BSC, self.out_proj, inputs.place_BSC)

    def _mix(
        self,
        z_BSC: Tensor,
        x_BSC: Tensor,
        dt_BSH: Tensor,
        bc_BSC: Tensor,
        inputs: MixerInputs,
        cache: StateCache | None,
    ) -> Tensor:
        """Return the input of the output projection."""
        documents = inputs.documents
        ssm: SSMValues = self.ssm(dt_BSH)
        initial_x_BKC = initial_bc_BKC = initial_state_BHPN = None
        if cache is not None:
            initial_x_BKC, initial_bc_BKC, initial_state_BHPN = cache.previous() or (None, None, None)
        elif self.left_context is not None:
            (x_BSC, bc_BSC), (initial_x_BKC, initial_bc_BKC) = self.left_context((x_BSC, bc_BSC), self.look_back)
        x_BSHP = self.conv_x(x_BSC, documents, initial_x_BKC).unflatten(-1, (-1, self.head_dim))
        B_BSC, C_BSC = halves(self.conv_bc(bc_BSC, documents, initial_bc_BKC))
        B_BSGN, C_BSGN = (part.unflatten(-1, (-1, self.d_state)) for part in (B_BSC, C_BSC))
        y_BSHP, state_BHPN = self.scan(x_BSHP, ssm, B_BSGN, C_BSGN, documents, initial_state_BHPN)
        if cache is not None:
            mask_BS = inputs.padding_mask_BS
            last_x_BKC = last_inputs(initial_x_BKC, x_BSC, self.look_back, mask_BS)
            cache.store(last_x_BKC, last_inputs(initial_bc_BKC, bc_BSC, self.look_back, mask_BS), state_BHPN)
        return self.norm(y_BSHP.flatten(2), z_BSC)

    def step_projections(self) -> tuple[nn.Module, ...]:
        """Return the projections to z, x, dt and to B, C."""
        return self.in_proj, self.bc_proj

    def step(self, projected_BM: Tensor, inputs: MixerInputs, cache: StateCache) -> Tensor:
        """Convolve, update the state and normalize, for one token."""
        kept = cache.previous()
        if not (has_kernels(projected_BM, self.conv_x.backend) and kept[2].dtype == torch.float32):
            bc_channels = self.conv_bc.bias.shape[0]
            cuts = [*_in_proj_sizes(projected_BM.shape[1] - bc_channels, self.head_dim), bc_channels]
            z_BSC, x_BSC, dt_BSH, bc_BSC = projected_BM[:, None].split(cuts, dim=-1)
            return self._mix(z_BSC, x_BSC, dt_BSH, bc_BSC, inputs, cache)[:, 0]
        from fusiontree.ops.step.mamba_triton import convolve_and_update

        y_BC = convolve_and_update(
            projected_BM,
            (self.conv_x.taps(), self.conv_bc.taps()),
            (kept[0], kept[1], kept[2]),
            (self.ssm.A_log, self.ssm.D, self.ssm.dt_bias),
            (self.ssm.dt_min, self.ssm.dt_max),
        )
        return self.norm(y_BC, projected_BM[:, : y_BC.shape[1]])

    def step_output(self) -> nn.Module:
        """Return the output projection."""
        return self.out_proj

    def bf16_rows(self, product: str, rows: int) -> int:
        """Keep the step sizes dt in bf16; they decide how long a state lasts."""
        return _in_proj_sizes(rows, self.head_dim)[-1] if product == "in_proj" else 0

    def scan(
        self,
        x_BSHP: Tensor,
        ssm: SSMValues,
        B_BSGN: Tensor,
        C_BSGN: Tensor,
        documents: Documents | None,
        initial_state_BHPN: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return ``y [B, S, H, P]`` and the final state ``[B, H, P, N]``; see :func:`fusiontree.ops.ssd.ssd_scan`."""
        tensors = (x_BSHP, ssm.dt_BSH, ssm.A_H, B_BSGN, C_BSGN, ssm.D_H)
        return ssd_scan(
            *tensors,
            chunk_size=min(self.chunk_size, x_BSHP.shape[1]),
            documents=documents,
            initial_state_BHPN=initial_state_BHPN,
            state_exchange=self.state_exchange,
            backend=self.scan_backend,
        )

    def use_context_parallel(self, tools: ContextTools) -> None:
        """Exchange states between chunks, and give the convolutions their left context."""
        self.state_exchange = tools.state_exchange
        self.left_context = tools.left_context

    @classmethod
    def tp_plan(cls, config: ModelConfig) -> dict[str, Split]:
        """Split heads, and groups of B and C."""
        inner, heads, groups = config.d_inner, config.mamba_heads, config.mamba.n_groups
        size = groups * config.mamba.d_state
        channels, per_head = Block("x", inner, heads), column(Block("dt", heads, heads))
        in_proj = column(Block("z", inner, heads), channels, Block("dt", heads, heads))
        bc = column(Block("B", size, groups), Block("C", size, groups))
        return {
            "in_proj.weight": in_proj,
            "bc_proj.weight": bc,
            "conv_x.weight": column(channels),
            "conv_x.bias": column(channels),
            "conv_bc.weight": bc,
            "conv_bc.bias": bc,
            "ssm.A_log": per_head,
            "ssm.D": per_head,
            "ssm.dt_bias": per_head,
            "norm.weight": column(channels),
            "out_proj.weight": row(channels),
        }

    @classmethod
    def tp_problems(cls, config: ModelConfig, tp: int) -> Iterator[str]:
        """Yield the reasons why heads and groups cannot be split over ``tp`` ranks."""
        sizes = config.mamba
        if config.mamba_heads % tp:
            yield (
                f"{config.mamba_heads} state space heads (expand * hidden_size / mamba.head_dim) do not divide by {tp}"
            )
        if sizes.n_groups % tp and tp % sizes.n_groups:
            yield f"mamba.n_groups {sizes.n_groups} is neither a multiple nor a divisor of {tp}"
        if sizes.norm_groups % tp:
            yield (
                f"mamba.norm_groups {sizes.norm_groups} is not a multiple of {tp}, so a group of the gated norm "
                f"would span several ranks"
            )

    @classmethod
    def exchanged_bytes(cls, config: ModelConfig, layer: int, tokens: float, cp: int, tp: int, itemsize: int) -> float:
        """Return the bytes of the states of all chunks, in fp32."""
        return config.d_inner / tp * config.mamba.d_state * 4 * cp

    @classmethod
    def initial_values(
        cls, name: str, shape: tuple[int, ...], config: ModelConfig, generator: torch.Generator
    ) -> Tensor | None:
        """Draw ``A_log`` and ``dt_bias`` from their configured ranges, convolutions within 1/sqrt(width); D is one.

        ``A_log`` is the logarithm of a uniform draw from ``mamba.A_init_range``, ``dt_bias`` the inverse softplus of a
        log-uniform draw from ``mamba.dt_init_range``.
        """
        if name == "ssm.D":
            return torch.ones(shape)
        if name == "ssm.A_log":
            return drawn_decay(shape, config.mamba.A_init_range, generator)
        if name == "ssm.dt_bias":
            return drawn_step_bias(shape, config.mamba.dt_init_range, generator)
        if name in ("conv_x.weight", "conv_bc.weight"):
            return drawn_taps(shape, generator)
        return None

    @classmethod
    def flops(cls, config: ModelConfig, layer: int, lengths: Sequence[int]) -> float:
        """Return ``7 d_inner d_state`` for the scan and ``2 width`` per channel of the convolutions."""
        sizes = config.mamba
        conv_channels = config.d_inner + 2 * sizes.n_groups * sizes.d_state
        return 7 * config.d_inner * sizes.d_state + 2 * sizes.d_conv * conv_channels

    @classmethod
    def activations(cls, config: ModelConfig, tp: int) -> Activations:
        """Count projections and the scan's states; convolutions, scan output and gated norm are cheap."""
        sizes = config.mamba
        inner, bc = config.d_inner / tp, 2 * sizes.n_groups * sizes.d_state / min(tp, sizes.n_groups)
        projected = 2 * inner + config.mamba_heads / tp + bc
        return Activations(projected + inner * sizes.d_state / _SCAN_CHUNK, (inner + bc) + inner + inner)

    @classmethod
    def seconds(cls, config: ModelConfig, layer: int, length: int) -> Seconds:
        """Return the scan's time."""
        return Seconds(kept=0.0, repeated=_SCAN_S * config.d_inner)

    @classmethod
    def new_cache(cls, config: ModelConfig, layer: int, capacity: int, dtype: torch.dtype) -> StateCache:
        """Return a cache of the last ``d_conv - 1`` inputs of each convolution and the state, ``[B, H, P, N]``."""
        return StateCache()


def _in_proj_sizes(rows: int, head_dim: int) -> list[int]:
    """Return how many of ``rows`` outputs of ``in_proj`` are z, x and dt, for any number of heads."""
    heads = rows // (2 * head_dim + 1)
    return [heads * head_dim, heads * head_dim, heads]


MIXERS.register(Mamba2Mixer.name, Mamba2Mixer)
