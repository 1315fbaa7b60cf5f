"""Configuration of a FusionTree model for transformers. Field names are those of FusionTree's own configuration."""

from __future__ import annotations

import copy
import sys
from typing import Any

import transformers
from transformers.configuration_utils import PretrainedConfig


class FusionTreeConfig(PretrainedConfig):
    """Shape of a hybrid language model of Mamba-2 or Gated DeltaNet and local/global attention.

    Settings that only matter while training (coefficients of auxiliary losses, initialisation) are kept as they are
    and not read.
    """

    model_type = "fusiontree"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}

    def __init__(
        self,
        vocab_size: int = 50432,
        hidden_size: int = 2048,
        num_layers: int = 16,
        layer_pattern: str | None = None,
        letters: dict[str, list[str]] | None = None,
        letter_sizes: dict[str, dict[str, int | None]] | None = None,
        mixers: dict[str, Any] | None = None,
        num_heads: int = 16,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        global_heads: int = 2,
        window_size: int = 1024,
        attention_type: str = "local_global",
        window_size_last: int | None = None,
        max_position_embeddings: int = 32768,
        rope_theta: float = 500000.0,
        global_rope: bool = True,
        srte_encoding: str = "sincos",
        gate_rank: int = 256,
        use_alignment: bool = True,
        branch_norm: bool = False,
        branch_mix: str = "gate",
        mlp_input: str = "branches",
        mlp_ratio: float = 2.0,
        mlp_activation: str = "gelu",
        norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        mamba: dict[str, Any] | None = None,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.layer_pattern = layer_pattern or "F" * num_layers
        self.letters, self.letter_sizes, self.mixers = letters, letter_sizes, mixers
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_dim = head_dim or hidden_size // num_heads
        self.global_heads = global_heads
        self.window_size = window_size
        self.attention_type = attention_type
        self.window_size_last = window_size_last
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta, self.global_rope = rope_theta, global_rope
        self.srte_encoding = srte_encoding
        self.gate_rank = gate_rank
        self.use_alignment = use_alignment
        self.branch_norm, self.branch_mix, self.mlp_input = branch_norm, branch_mix, mlp_input
        self.mlp_ratio = mlp_ratio
        self.mlp_activation = mlp_activation
        self.norm_eps = norm_eps
        self.initializer_range = initializer_range
        sizes = {"head_dim": 64, "d_state": 128, "n_groups": 1, "norm_groups": 1, "d_conv": 4, "expand": 2}
        self.mamba = {**sizes, "dt_min": None, "dt_max": None, "chunk_size": 256, **(mamba or {})}
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def d_inner(self) -> int:
        """Inner width of the Mamba-2 mixer."""
        heads = self.mamba.get("num_heads")
        return self.mamba["expand"] * self.hidden_size if heads is None else heads * self.mamba["head_dim"]

    @property
    def mlp_size(self) -> int:
        """Inner width of the MLP."""
        return int(self.mlp_ratio * self.hidden_size)

    def mixers_of_layer(self, layer: int) -> list[str]:
        """Return the names of the layer's mixers, in the order of its branches."""
        built_in = {"F": ["mamba2", "attention"], "M": ["mamba2"], "A": ["attention"]}
        return (built_in | (self.letters or {}))[self.layer_pattern[layer]]

    def of_layer(self, layer: int) -> FusionTreeConfig:
        """Return the configuration with the sizes of ``layer``, which ``letter_sizes`` gives by its letter."""
        given = (self.letter_sizes or {}).get(self.layer_pattern[layer], {})
        sizes = {name: size for name, size in given.items() if size is not None}
        if not sizes:
            return self
        sized = copy.copy(self)
        sized.letter_sizes = None
        names = {"mamba_heads": "num_heads", "mamba_groups": "n_groups", "mamba_norm_groups": "norm_groups"}
        sized.mamba = {**self.mamba, **{names[name]: size for name, size in sizes.items() if name in names}}
        one_kv_head_each = self.num_kv_heads == self.num_heads
        sized.num_heads = sizes.get("num_heads", self.num_heads)
        sized.num_kv_heads = sizes.get("num_kv_heads", sized.num_heads if one_kv_head_each else self.num_kv_heads)
        sized.global_heads = sizes.get("global_heads", self.global_heads)
        if "window_size" in sizes:
            sized.window_size, sized.attention_type = sizes["window_size"], "local_global"
        if "mlp_size" in sizes:
            sized.mlp_ratio = (sizes["mlp_size"] + 0.5) / self.hidden_size
        return sized

    def window_of_layer(self, layer: int) -> int:
        """Tokens that the local heads of ``layer`` see, their own included."""
        if self.attention_type == "local_global" or self.num_layers == 1:
            return self.window_size
        last = self.window_size_last or self.max_position_embeddings
        return round(self.window_size + (last - self.window_size) * layer / (self.num_layers - 1))


# `transformers serve` looks the class of a model up in the module transformers, of which it may hold an earlier object
# than this import returns. The auto class finds the class beside this file.
_serving = sys.modules.get("transformers.cli.serving.model_manager")
_modules: list[Any] = [transformers, getattr(_serving, "transformers", transformers)]
for _module in _modules:
    if not hasattr(_module, "FusionTreeForCausalLM"):
        _module.FusionTreeForCausalLM = transformers.AutoModelForCausalLM
