"""Mamba-2 mixer (Dao and Gu 2024, "Transformers are SSMs", section 7), with a separate projection for B and C.

Shape legend: B rows, S tokens, H state space heads, P channels of a head, G groups of B and C, N size of the state,
C channels (of the model, or H*P of the mixer), K width of the convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusiontree.models.config import ModelConfig
from fusiontree.models.fused_linear import project
from fusiontree.models.layer_cache import MambaCache
from fusiontree.models.norm import GatedRMSNorm
from fusiontree.models.weight_layout import bc_proj_rows, in_proj_rows, in_proj_sizes, split_bc_proj, split_in_proj
from fusiontree.ops.conv import causal_conv1d
from fusiontree.ops.documents import Documents
from fusiontree.ops.elementwise import fused
from fusiontree.ops.recompute import recomputed
from fusiontree.ops.ssd import StateExchange, ssd_scan

_HALF = (torch.bfloat16, torch.float16)


class SSMValues(NamedTuple):
    """A, D and step sizes for the scan, in fp32."""

    A_H: Tensor
    """Decay rates, negative."""
    D_H: Tensor
    """Skip weights."""
    dt_BSH: Tensor
    """Step sizes, positive."""


class SSMParameters(nn.Module):
    """Decay, skip and step bias of the state space heads, always in fp32.

    Half precision cannot represent decays near one accurately enough. So these parameters have a separate module, which
    engines keep in fp32 and which stays in fp32 when the model is converted (``model.bfloat16()``).
    """

    def __init__(self, heads: int, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))

    def forward(self, dt_BSH: Tensor) -> SSMValues:
        """Return ``A = -exp(A_log)``, ``D`` and the step sizes ``softplus(dt + dt_bias)``.

        The projected dt comes in here, not the bias out: a module without arguments makes torch 2.11's FSDP2 fail
        when a checkpointed block is recomputed on a GPU.
        """
        parameters = (_at_least_fp32(p) for p in (self.A_log, self.D, self.dt_bias))
        decoding = dt_BSH.shape[1] == 1 and not torch.is_grad_enabled()  # decoding: launches of small kernels dominate
        values = fused(_ssm_values, self.backend, dt_BSH.device.type) if decoding else _ssm_values
        return SSMValues(*values(dt_BSH, *parameters))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_precision(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            return tensor.to(converted.device) if converted.dtype in _HALF else converted

        return super()._apply(keep_precision, recurse)


def _ssm_values(dt_BSH: Tensor, A_log_H: Tensor, D_H: Tensor, dt_bias_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # A copy of D: an engine that shards parameters frees them when the forward ends.
    return -torch.exp(A_log_H), D_H.clone(), F.softplus(dt_BSH.to(dt_bias_H.dtype) + dt_bias_H)


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _HALF else tensor


class CausalConv(nn.Module):
    """Depthwise causal convolution and SiLU; taps do not reach beyond document starts."""

    def __init__(self, channels: int, width: int, backend: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels))
        self.backend = backend

    def forward(self, x_BSC: Tensor, documents: Documents | None, initial_BKC: Tensor | None = None) -> Tensor:
        """Return ``[B, S, C]``; ``initial_BKC [B, K-1, C]`` are the inputs before the first token."""
        weight_CK, bias_C = self.taps()
        convolve = partial(causal_conv1d, documents=documents, initial_BKC=initial_BKC, backend=self.backend)
        return recomputed(convolve, x_BSC, weight_CK, bias_C)

    def taps(self) -> tuple[Tensor, Tensor]:
        """Return the weight and bias to apply; a subclass can select channels."""
        return self.weight, self.bias


class SSDScan(nn.Module):
    """The scan as a module without parameters, so that a parallel plan can replace it.

    ``state_exchange``: set under context parallelism. Returns the state before this rank's chunk; see
    :func:`fusiontree.ops.ssd.ssd_scan`.
    """

    state_exchange: StateExchange | None = None

    def __init__(self, chunk_size: int, backend: str) -> None:
        super().__init__()
        self.chunk_size = chunk_size
        self.backend = backend

    def forward(
        self,
        x_BSHP: Tensor,
        dt_BSH: Tensor,
        ssm: SSMValues,
        B_BSGN: Tensor,
        C_BSGN: Tensor,
        documents: Documents | None,
        initial_state_BHPN: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return ``y [B, S, H, P]`` and the final state ``[B, H, P, N]``; see :func:`fusiontree.ops.ssd.ssd_scan`."""
        return ssd_scan(
            x_BSHP,
            dt_BSH,
            ssm.A_H,
            B_BSGN,
            C_BSGN,
            ssm.D_H,
            chunk_size=min(self.chunk_size, x_BSHP.shape[1]),
            documents=documents,
            initial_state_BHPN=initial_state_BHPN,
            state_exchange=self.state_exchange,
            backend=self.backend,
        )


class Mamba2Mixer(nn.Module):
    """Projections, convolution, scan, gated norm, output projection.

    The numbers of heads and groups are derived from the projections' outputs, so the same code runs on a tensor
    parallel rank's share of the heads.

    ``inputs_before(inputs, n)``: set under context parallelism. Takes the inputs of both convolutions. Returns the
    inputs (use these; they carry the gradient) and, for each, the ``n`` tokens that precede this rank's chunk.
    """

    fused_projections = False
    inputs_before: Callable[[Sequence[Tensor], int], tuple[Sequence[Tensor], Sequence[Tensor]]] | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes, kernels = config.mamba, config.kernels
        bc_channels = sum(block.size for block in bc_proj_rows(config))
        self.head_dim = sizes.head_dim
        self.d_state = sizes.d_state
        self.look_back = sizes.d_conv - 1
        self.in_proj = nn.Linear(config.hidden_size, sum(block.size for block in in_proj_rows(config)), bias=False)
        self.bc_proj = nn.Linear(config.hidden_size, bc_channels, bias=False)
        self.conv_x = CausalConv(config.d_inner, sizes.d_conv, kernels.conv)
        self.conv_bc = CausalConv(bc_channels, sizes.d_conv, kernels.conv)
        self.ssm = SSMParameters(config.mamba_heads, kernels.elementwise)
        self.scan = SSDScan(sizes.chunk_size, kernels.ssd)
        self.norm = GatedRMSNorm(config.d_inner, sizes.norm_groups, config.norm_eps, config.kernels.elementwise)
        self.out_proj = nn.Linear(config.d_inner, config.hidden_size, bias=False)

    def forward(
        self,
        u_BSC: Tensor,
        documents: Documents | None,
        cache: MambaCache | None = None,
        padding_mask_BS: Tensor | None = None,
    ) -> Tensor:
        """Mix along the tokens.

        Args:
            u_BSC: input ``[B, S, hidden_size]``.
            documents: boundaries at which convolution and state restart; None means each row is one document.
            cache: this layer's convolution inputs and state before the first token; updated.
            padding_mask_BS: True on real tokens; needed to fill a cache from padded rows.

        Returns:
            ``[B, S, hidden_size]``.
        """
        cut = partial(in_proj_sizes, head_dim=self.head_dim)
        *zxdt, bc_BSC = project(u_BSC, (self.in_proj, self.bc_proj), joint=self.fused_projections, cuts=(cut, None))
        z_BSC, x_BSC, dt_BSH = zxdt if len(zxdt) == 3 else split_in_proj(zxdt[0], self.head_dim)
        ssm: SSMValues = self.ssm(dt_BSH)
        initial_x_BKC = initial_bc_BKC = initial_state_BHPN = None
        if cache is not None:
            initial_x_BKC, initial_bc_BKC, initial_state_BHPN = cache.before()
        elif self.inputs_before is not None and self.look_back:
            inputs, before = self.inputs_before((x_BSC, bc_BSC), self.look_back)
            (x_BSC, bc_BSC), (initial_x_BKC, initial_bc_BKC) = inputs, before
        x_BSHP = self.conv_x(x_BSC, documents, initial_x_BKC).unflatten(-1, (-1, self.head_dim))
        B_BSGN, C_BSGN = split_bc_proj(self.conv_bc(bc_BSC, documents, initial_bc_BKC), self.d_state)
        y_BSHP, state_BHPN = self.scan(x_BSHP, ssm.dt_BSH, ssm, B_BSGN, C_BSGN, documents, initial_state_BHPN)
        if cache is not None:
            cache.store(x_BSC, bc_BSC, state_BHPN, padding_mask_BS)
        return self.out_proj(self.norm(y_BSHP.flatten(2), z_BSC))
