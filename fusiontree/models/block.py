"""One layer: two branches read the same input in parallel, a gate mixes their outputs.

Shape legend: B rows, S tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusiontree.models.attention import LocalGlobalAttention
from fusiontree.models.config import ModelConfig
from fusiontree.models.gate import Alignment, FusionGate, RowGateSums
from fusiontree.models.layer_cache import LayerCache
from fusiontree.models.mamba import Mamba2Mixer
from fusiontree.models.mlp import MLP
from fusiontree.models.norm import ResidualRMSNorm
from fusiontree.models.token_layout import BlockInputs
from fusiontree.ops.gate import gate_mix
from fusiontree.ops.recompute import recomputed


class FusionBlock(nn.Module):
    """A residual block in two stages: :meth:`branches` mixes along the tokens, :meth:`mix` acts on each token alone.

    The layer's letter in ``layer_pattern`` selects the branches: F both, M Mamba, A attention. A missing branch counts
    as zeros; neither it nor the columns of the alignment that would read its output have parameters.

    ``gather_tokens`` and ``scatter_tokens`` are identities at the two borders between the stages; a parallel plan
    replaces them by an all-gather and a reduce-scatter.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        letter = config.pattern[layer]
        self.kind = letter
        self.has_mamba, self.has_attention = letter in "FM", letter in "FA"
        hidden = config.hidden_size
        self.norm = ResidualRMSNorm(hidden, config.norm_eps, config.kernels.elementwise)
        self.backend = config.kernels.elementwise
        self.gather_tokens: nn.Module = nn.Identity()
        if self.has_mamba:
            self.mamba = Mamba2Mixer(config)
        if self.has_attention:
            self.attention = LocalGlobalAttention(config, layer)
        self.scatter_tokens: nn.Module = nn.Identity()
        self.align = Alignment(self.has_mamba + self.has_attention, hidden) if config.use_alignment else None
        self.gate = FusionGate(config)
        self.out_proj = nn.Linear(hidden, hidden, bias=False)
        self.mlp = MLP(config)

    def forward(
        self,
        x_BSC: Tensor,
        inputs: BlockInputs,
        branch_scale_B2: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, RowGateSums]:
        """Return the residual stream after this layer and the sums of its gates.

        Args:
            x_BSC: residual stream ``[B, S, C]``.
            inputs: documents, positions and padding of the tokens.
            branch_scale_B2: factors of each row's (Mamba, attention) outputs; 0 drops a branch.
            cache: the branches' caches for decoding; updated.
        """
        u_BSC, x_BSC = self.norm(x_BSC)
        ma_BSC = self.branches(self.gather_tokens(u_BSC), inputs, cache)
        return self.mix(x_BSC, self.scatter_tokens(ma_BSC), branch_scale_B2, inputs.padding_mask_BS)

    def branches(self, u_BSC: Tensor, inputs: BlockInputs, cache: LayerCache | None = None) -> Tensor:
        """Return the branches' concatenated outputs: ``[B, S, 2C]`` for two branches, ``[B, S, C]`` for one."""
        outputs = []
        if self.has_mamba:
            timed_BSC = u_BSC if inputs.srte_BSC is None else recomputed(torch.add, u_BSC, inputs.srte_BSC)
            outputs.append(self.mamba(timed_BSC, inputs.documents, cache and cache.mamba, inputs.padding_mask_BS))
        if self.has_attention:
            outputs.append(
                self.attention(
                    u_BSC,
                    inputs.cos_BSD,
                    inputs.sin_BSD,
                    inputs.documents,
                    cache and cache.attention,
                    inputs.new,
                )
            )
        return torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]

    def mix(
        self,
        x_BSC: Tensor,
        ma_BSC: Tensor,
        branch_scale_B2: Tensor | None = None,
        padding_mask_BS: Tensor | None = None,
    ) -> tuple[Tensor, RowGateSums]:
        """Scale, align and gate the branches' outputs and add them to the residual stream, token by token."""
        if branch_scale_B2 is not None:
            first, last = 0 if self.has_mamba else 1, 2 if self.has_attention else 1
            scale_BSn = branch_scale_B2[:, None, first:last].to(ma_BSC.dtype)
            ma_BSC = (ma_BSC.unflatten(-1, (last - first, -1)) * scale_BSn.unsqueeze(-1)).flatten(2)
        if self.align is not None:
            z_BSC = self.align(ma_BSC)
        elif self.has_mamba and self.has_attention:
            z_BSC = torch.add(*ma_BSC.chunk(2, dim=-1)) / 2
        else:
            z_BSC = ma_BSC / 2
        mixed_BSC, sums = gate_mix(self.gate(z_BSC), ma_BSC, padding_mask_BS, kind=self.kind, backend=self.backend)
        return x_BSC + self.out_proj(mixed_BSC) + self.mlp(z_BSC), RowGateSums(*sums)
