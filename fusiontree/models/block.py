"""One layer: branches read the same input in parallel, a gate mixes their outputs.

Shape legend: B rows, S tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusiontree.models.config import ModelConfig
from fusiontree.models.gate import Alignment, FusionGate
from fusiontree.models.mixers import layer_mixers
from fusiontree.models.mixers.base import Mixer
from fusiontree.models.mixers.cache import LayerCache
from fusiontree.models.mlp import MLP
from fusiontree.models.norm import ResidualRMSNorm
from fusiontree.models.token_layout import BlockInputs
from fusiontree.ops.gate import Present, gate_mix
from fusiontree.ops.recompute import recomputed
from fusiontree.utils.errors import UserError
from fusiontree.utils.layer_metrics import layer_metric_sums


class FusionBlock(nn.Module):
    """A residual block in two stages: :meth:`branches` mixes along the tokens, :meth:`mix` acts on each token alone.

    The layer's letter in ``layer_pattern`` names the mixers of its one or two branches. With two branches the gate
    weighs the first by g and the second by 1 - g. With one branch the missing output counts as zeros; the
    alignment has no columns for it.

    ``gather_tokens`` and ``scatter_tokens`` are identities at the two borders between the stages; a parallel plan
    replaces them by an all-gather and a reduce-scatter.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """Create the parameters uninitialized.

        Raises:
            UserError: a mixer's ``module_name`` is taken by another part of the block.
        """
        super().__init__()
        hidden = config.hidden_size
        classes = layer_mixers(config, layer)
        self.norm = ResidualRMSNorm(hidden, config.norm_eps, config.kernels.elementwise)
        self.backend = config.kernels.elementwise
        self.gather_tokens: nn.Module = nn.Identity()
        for mixer in classes:
            if hasattr(self, mixer.module_name) or mixer.module_name in _PARTS:
                raise UserError(f"mixer {mixer.name}: module_name '{mixer.module_name}' is taken; choose another")
            self.add_module(mixer.module_name, mixer(config, layer))
        self._branches = [(mixer.module_name, mixer.adds_time_encoding) for mixer in classes]
        alone: Present = "second" if classes[0].alone_is_second else "first"
        self.present: Present = "both" if len(classes) == 2 else alone
        self.scatter_tokens: nn.Module = nn.Identity()
        self.align = Alignment(len(classes), hidden) if config.use_alignment else None
        self.gate = FusionGate(config)
        self.out_proj = nn.Linear(hidden, hidden, bias=False)
        self.mlp = MLP(config)

    def mixers(self) -> dict[str, Mixer]:
        """Return the mixers of the branches in order, by ``module_name``."""
        return {name: getattr(self, name) for name, _ in self._branches}

    def forward(
        self,
        x_BSC: Tensor,
        inputs: BlockInputs,
        branch_scale_B2: Tensor | None = None,
        cache: LayerCache | None = None,
        layer_metrics: tuple[str, ...] = (),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the residual stream after this layer and sums over each row's tokens and channels, ``[B]`` in fp32.

        The sums are those of the gates (``gate``), of their binary entropies in nats (``entropy``) and of their
        squares (``square``), and those of the layer metrics (``metric.field``).

        Args:
            x_BSC: residual stream ``[B, S, C]``.
            inputs: documents, positions and padding of the tokens.
            branch_scale_B2: factors of each row's (first, second) branch outputs; 0 drops a branch.
            cache: the branches' caches for decoding; updated.
            layer_metrics: names of layer metrics to compute.
        """
        u_BSC, x_BSC = self.norm(x_BSC)
        outputs_BSC = self.scatter_tokens(self.branches(self.gather_tokens(u_BSC), inputs, cache))
        return self.mix(x_BSC, outputs_BSC, branch_scale_B2, inputs.mixer.padding_mask_BS, layer_metrics)

    def branches(self, u_BSC: Tensor, inputs: BlockInputs, cache: LayerCache | None = None) -> Tensor:
        """Return the branches' concatenated outputs: ``[B, S, 2C]`` for two branches, ``[B, S, C]`` for one."""
        outputs = []
        for name, adds_time_encoding in self._branches:
            input_BSC = u_BSC
            if adds_time_encoding and inputs.srte_BSC is not None:
                input_BSC = recomputed(torch.add, u_BSC, inputs.srte_BSC)
            outputs.append(getattr(self, name)(input_BSC, inputs.mixer, cache and cache[name]))
        return torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]

    def mix(
        self,
        x_BSC: Tensor,
        outputs_BSC: Tensor,
        branch_scale_B2: Tensor | None = None,
        padding_mask_BS: Tensor | None = None,
        layer_metrics: tuple[str, ...] = (),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gated branches and the MLP to the residual stream, token by token; both read the aligned outputs."""
        branches = len(self._branches)
        metric_sums: dict[str, Tensor] = {}
        if layer_metrics:
            outputs = dict(zip(self.mixers(), outputs_BSC.detach().chunk(branches, dim=-1), strict=True))
            with torch.no_grad():
                metric_sums = layer_metric_sums(layer_metrics, outputs, padding_mask_BS)
        if branch_scale_B2 is not None:
            first = 1 if self.present == "second" else 0
            scale_BSn = branch_scale_B2[:, None, first : first + branches].to(outputs_BSC.dtype)
            outputs_BSC = (outputs_BSC.unflatten(-1, (branches, -1)) * scale_BSn.unsqueeze(-1)).flatten(2)
        if self.align is not None:
            z_BSC = self.align(outputs_BSC)
        elif branches == 2:
            z_BSC = torch.add(*outputs_BSC.chunk(2, dim=-1)) / 2
        else:
            z_BSC = outputs_BSC / 2
        mixed_BSC, (gate_B, entropy_B, square_B) = gate_mix(
            self.gate(z_BSC), outputs_BSC, padding_mask_BS, present=self.present, backend=self.backend
        )
        sums = {"gate": gate_B, "entropy": entropy_B, "square": square_B} | metric_sums
        return x_BSC + self.out_proj(mixed_BSC) + self.mlp(z_BSC), sums


_PARTS = ("align", "gate", "out_proj", "mlp", "scatter_tokens", "present")
"""Attributes that the constructor sets after the mixers, so that ``hasattr`` does not find them yet."""
