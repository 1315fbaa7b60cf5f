"""A plain Llama of our number of parameters, trained by the same trainer: the benchmark's peer ``llama``.

It differs from the hybrid in its blocks alone: x + attention(norm(x)), then x + SwiGLU(norm(x)), every head global
(Touvron et al. 2023, "LLaMA", with grouped queries). Embedding, final norm, head, hidden size, heads, kernels, engine,
optimizer, recomputation, data and step are ours. It has as many layers as come nearest to our size with an MLP of 8/3
hidden sizes; the MLP's width, a multiple of 64, makes up the rest.
"""

from __future__ import annotations

from fusiontree.models.config import ModelConfig
from fusiontree.utils.errors import UserError

_MULTIPLE = 64
"""Of the MLP's width, less in models narrower than 512: matrix products of other sizes waste a tile."""


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
        "letter_sizes": None,
        "mixers": None,
        "global_heads": ours.num_heads,
        "attention_type": "local_global",
        "window_size_last": None,
        "srte_encoding": "none",
        "use_alignment": False,
        "branch_norm": False,
        "branch_mix": "sum",
        "mlp_input": "residual",
        "global_rope": True,
        "mlp_ratio": (width + 0.5) / hidden,  # mlp_size rounds down
        "mlp_activation": "swiglu",
        "drop_branch_prob": 0.0,
        "load_balance_coeff": 0.0,
        "entropy_reg_coeff": 0.0,
    }
    return ModelConfig.model_validate(ours.model_dump() | sizes)
