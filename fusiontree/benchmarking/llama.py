"""A plain Llama of our number of parameters, trained by the same trainer: the benchmark's peer ``llama``.

It differs from the hybrid in its blocks alone: x + attention(norm(x)), then x + SwiGLU(norm(x)), every head global
(Touvron et al. 2023, "LLaMA", with grouped queries). Embedding, final norm, head, hidden size, heads, kernels, engine,
optimizer, recomputation, data and step are ours. It has as many layers as come nearest to our size with an MLP of 8/3
hidden sizes; the MLP's width, a multiple of 64, makes up the rest.

Shape legend: B rows, S tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fusiontree.models.block import MLP, FusionBlock
from fusiontree.models.config import ModelConfig
from fusiontree.models.mixers.attention import LocalGlobalAttention
from fusiontree.models.mixers.base import Mixer
from fusiontree.models.mixers.cache import LayerCache
from fusiontree.models.model import FusionTreeModel
from fusiontree.models.norm import ResidualRMSNorm
from fusiontree.models.token_layout import BlockInputs
from fusiontree.utils.errors import UserError

_MULTIPLE = 64
"""Of the MLP's width, less in models narrower than 512: matrix products of other sizes waste a tile."""


class NormedMLP(MLP):
    """``x + SwiGLU(norm(x))``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.norm = ResidualRMSNorm(config.hidden_size, config.norm_eps, config.kernels.elementwise)

    def forward(self, x_BSC: Tensor) -> Tensor:
        """Return the residual stream after the MLP, ``[B, S, C]``."""
        z_BSC, x_BSC = self.norm(x_BSC)
        return x_BSC + super().forward(z_BSC)


class LlamaBlock(FusionBlock):
    """Attention and MLP one after the other, called as our block is; its sums are zero, as it has no gate."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        nn.Module.__init__(self)
        self.norm = ResidualRMSNorm(config.hidden_size, config.norm_eps, config.kernels.elementwise)
        self.attention = LocalGlobalAttention(config, layer)
        self.mlp = NormedMLP(config)

    def mixers(self) -> dict[str, Mixer]:
        """Return the attention."""
        return {"attention": self.attention}

    def forward(
        self,
        x_BSC: Tensor,
        inputs: BlockInputs,
        branch_scale_B2: Tensor | None = None,
        cache: LayerCache | None = None,
        layer_metrics: tuple[str, ...] = (),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the residual stream after this layer, and zeros ``[B]``; see :meth:`FusionBlock.forward`."""
        u_BSC, x_BSC = self.norm(x_BSC)
        x_BSC = x_BSC + self.attention(u_BSC, inputs.mixer, cache and cache["attention"])
        none_B = x_BSC.new_zeros(x_BSC.shape[0], dtype=torch.float32)
        return self.mlp(x_BSC), dict.fromkeys(("gate", "entropy", "square"), none_B)


class Llama(FusionTreeModel):
    """Our model with Llama's blocks; ``config`` is of :func:`llama_config`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(LlamaBlock(config, layer) for layer in range(config.num_layers))


def llama_config(ours: ModelConfig, parameters: int) -> ModelConfig:
    """Return the sizes of a Llama of ``parameters`` parameters with our hidden size, heads, vocabulary and kernels.

    Raises:
        UserError: no such Llama comes within 2% of ``parameters``: the model is very small or very flat.
    """
    hidden = ours.hidden_size
    embeddings = (1 if ours.tie_word_embeddings else 2) * ours.vocab_size * hidden + hidden
    attention = 2 * hidden * (ours.num_heads + ours.kv_heads) * ours.attention_head_dim + 2 * hidden
    layers = max(1, round((parameters - embeddings) / (attention + 8 * hidden * hidden)))
    width = ((parameters - embeddings) / layers - attention) / (3 * hidden)
    multiple = min(_MULTIPLE, max(1, hidden // 8))
    width = max(1, round(width / multiple)) * multiple
    found = embeddings + layers * (attention + 3 * hidden * width)
    if abs(found / parameters - 1) > 0.02:
        raise UserError(
            f"peer llama: with hidden_size {hidden} the nearest Llama has {found:,} parameters and the model "
            f"{parameters:,}, more than 2% apart; measure a larger model"
        )
    sizes = {
        "num_layers": layers,
        "layer_pattern": "A" * layers,
        "letters": None,
        "mixers": None,
        "global_heads": ours.num_heads,
        "attention_type": "local_global",
        "window_size_last": None,
        "srte_encoding": "none",
        "use_alignment": False,
        "mlp_ratio": (width + 0.5) / hidden,  # mlp_size rounds down
        "mlp_activation": "swiglu",
        "drop_branch_prob": 0.0,
        "load_balance_coeff": 0.0,
        "entropy_reg_coeff": 0.0,
    }
    return ModelConfig.model_validate(ours.model_dump() | sizes)


def llama_training_flops(config: ModelConfig, lengths: Sequence[int]) -> float:
    """Return the FLOPs of training on one token of documents of ``lengths`` tokens, counted as ours are."""
    per_layer = 2.0 * LocalGlobalAttention.matrix_parameters(config) + 6.0 * config.hidden_size * config.mlp_size
    per_layer += LocalGlobalAttention.flops(config, 0, lengths)
    return 3.0 * (config.num_layers * per_layer + 2.0 * config.vocab_size * config.hidden_size)
