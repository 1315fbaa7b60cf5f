"""The ``model`` section: sizes and kernels of the model."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import model_validator

from fusiontree.models.config_checks import check_model
from fusiontree.models.mixers import mixer_class
from fusiontree.ops.config import KernelsConfig
from fusiontree.utils.settings import Section, check_positive_ranges, setting, validated

LETTERS: dict[str, tuple[str, ...]] = {"F": ("mamba2", "attention"), "M": ("mamba2",), "A": ("attention",)}
"""The mixers of a layer, by its letter in ``layer_pattern``; ``letters`` adds others."""


class MambaConfig(Section):
    """The Mamba-2 mixer."""

    head_dim: int = setting(64, "Channels of one state space head.", unit="channels", ge=1)
    d_state: int = setting(128, "State size per channel.", ge=1)
    n_groups: int = setting(1, "Groups of heads that share B and C.", ge=1)
    norm_groups: int = setting(1, "Channel groups that the gated norm normalizes separately; a multiple of tp.", ge=1)
    d_conv: int = setting(4, "Width of the causal convolution, this token included.", unit="tokens", ge=2)
    expand: int = setting(2, "Inner width as a multiple of hidden_size.", ge=1)
    num_heads: int | None = setting(None, "State space heads. Absent means expand * hidden_size / head_dim.", ge=1)
    chunk_size: int = setting(
        256, "Tokens per scan chunk (one matrix product); kernels.ssd=triton ignores it.", unit="tokens", ge=1
    )
    A_init_range: list[float] = setting([1.0, 16.0], "Range from which -A is drawn.", min_length=2, max_length=2)
    dt_init_range: list[float] = setting(
        [0.001, 0.1], "Range of the initial step size, log-uniform.", min_length=2, max_length=2
    )
    dt_min: float | None = setting(None, "Lower limit of every step size. Absent means none.", ge=0)
    dt_max: float | None = setting(None, "Upper limit of every step size. Absent means none.", gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_positive_ranges(self, "A_init_range", "dt_init_range")
        if self.dt_min is not None and self.dt_max is not None and self.dt_min >= self.dt_max:
            raise ValueError(f"dt_min {self.dt_min} is not below dt_max {self.dt_max}")
        return self


class LetterSizes(Section):
    """Sizes of the layers of one letter of ``layer_pattern``; an absent size is the model's."""

    num_heads: int | None = setting(None, "Query heads, local and global together.", ge=1)
    num_kv_heads: int | None = setting(None, "Key/value heads.", ge=1)
    global_heads: int | None = setting(None, "Global query heads; the last heads.", ge=0)
    window_size: int | None = setting(None, "Tokens that a local head sees.", unit="tokens", ge=1)
    mamba_heads: int | None = setting(None, "State space heads.", ge=1)
    mamba_groups: int | None = setting(None, "Groups of state space heads that share B and C.", ge=1)
    mamba_norm_groups: int | None = setting(None, "Channel groups of Mamba's gated norm.", ge=1)
    mlp_size: int | None = setting(None, "Inner width of the MLP.", unit="channels", ge=1)


class ModelConfig(Section):
    """The hybrid language model."""

    vocab_size: int = setting(50432, "Tokens of the vocabulary; a multiple of parallel.tp.", unit="tokens", ge=2)
    hidden_size: int = setting(2048, "Width of the residual stream.", unit="channels", ge=1)
    num_layers: int = setting(16, "Blocks.", ge=1)
    layer_pattern: str | None = setting(
        None, "One letter per layer: F Mamba-2 and attention, M Mamba-2, A attention, or of letters. Absent: all F."
    )
    letters: dict[str, list[str]] | None = setting(
        None,
        "Further letters: each with the mixers of its layers, one or two. The gate weighs the first by g, the other by "
        "1 - g.",
    )
    letter_sizes: dict[str, LetterSizes] | None = setting(
        None, "Sizes of the layers of a letter where they differ from the model's, as in a pruned model."
    )
    mixers: dict[str, Any] | None = setting(
        None, "Settings of gated_delta_net (docs/mixers.md) and of mixers that plugins add, by name of the mixer."
    )
    num_heads: int = setting(16, "Query heads, local and global together.", ge=1)
    num_kv_heads: int | None = setting(None, "Key/value heads (grouped queries). Absent means num_heads.", ge=1)
    head_dim: int | None = setting(
        None, "Channels of one attention head. Absent means hidden_size / num_heads.", unit="channels", ge=2
    )
    global_heads: int = setting(2, "Global query heads, which see the full document; the last heads.", ge=0)
    window_size: int = setting(1024, "Tokens that a local head sees, including the query's token.", unit="tokens", ge=1)
    attention_type: Literal["local_global", "pyramidal"] = setting(
        "local_global", "pyramidal: the window of the local heads widens with depth."
    )
    window_size_last: int | None = setting(
        None,
        "pyramidal: window of the last layer; layers between are interpolated linearly. Absent means "
        "max_position_embeddings.",
        unit="tokens",
        ge=1,
    )
    max_position_embeddings: int = setting(32768, "Longest sequence that the model is made for.", unit="tokens", ge=1)
    rope_theta: float = setting(500000.0, "Base of the rotary position encoding.", gt=0)
    global_rope: bool = setting(True, "Rotary positions on global heads; false: on local heads alone.")
    srte_encoding: Literal["none", "sincos", "learnable"] = setting(
        "sincos", "Shared relative time encoding, added to the input of every recurrent branch."
    )
    gate_rank: int = setting(256, "Rank of the gate's two projections.", ge=1)
    use_alignment: bool = setting(True, "Combine both branches by a learned alignment; false: by their mean.")
    branch_norm: bool = setting(False, "Normalize the output of each branch (RMS norm) before they are combined.")
    branch_mix: Literal["gate", "gated_sum", "mean", "concat", "sum"] = setting(
        "gate",
        "Combination of the branches that is added to the residual stream: gate weighs each channel by the learned "
        "gate; mean averages; concat concatenates (these three followed by a projection); gated_sum weighs by the "
        "gate, and sum adds the branches, without projection.",
    )
    mlp_input: Literal["branches", "residual"] = setting(
        "branches",
        "Input of the MLP: branches reads the aligned branches, so that mix and MLP are computed side by side; "
        "residual reads the norm of the residual stream after the mix, as in a transformer.",
    )
    mlp_ratio: float = setting(2.0, "Inner width of the MLP as a multiple of hidden_size.", gt=0)
    mlp_activation: Literal["gelu", "swiglu"] = setting("gelu", "Non-linearity of the MLP.")
    norm_eps: float = setting(1e-5, "Added to the mean square in every norm.", gt=0)
    initializer_range: float = setting(
        0.02, "Standard deviation of initial weights; divided by sqrt(2 num_layers) for output projections.", gt=0
    )
    tie_word_embeddings: bool = setting(False, "Use the embedding matrix as the head.")
    drop_branch_prob: float = setting(
        0.0, "Probability per sequence and layer of dropping one of the two branches in training.", ge=0, lt=1
    )
    load_balance_coeff: float = setting(0.0, "Weight of the gate's load balance loss.", ge=0)
    entropy_reg_coeff: float = setting(
        0.0, "Weight of the gate's mean entropy: positive makes gates decisive, negative keeps them open."
    )
    z_loss_coeff: float = setting(0.0, "Weight of the z-loss: the head's mean squared log-partition.", ge=0)
    mamba: MambaConfig = setting(MambaConfig, "The Mamba-2 mixer.")
    kernels: KernelsConfig = setting(KernelsConfig, "Backends of the operations.")

    @property
    def pattern(self) -> str:
        """One letter per layer."""
        return self.layer_pattern or "F" * self.num_layers

    @property
    def mixers_by_letter(self) -> dict[str, tuple[str, ...]]:
        """Names of the mixers of each letter that ``layer_pattern`` may use."""
        return LETTERS | {letter: tuple(names) for letter, names in (self.letters or {}).items()}

    @property
    def branches(self) -> list[tuple[str, ...]]:
        """Names of each layer's mixers, in the order of its branches."""
        known = self.mixers_by_letter
        return [known[letter] for letter in self.pattern]

    @property
    def adds_time_encoding(self) -> bool:
        """Whether the input of a branch gets the shared relative time encoding."""
        return any(mixer_class(name).adds_time_encoding for names in self.branches for name in names)

    @property
    def reads_alignment(self) -> bool:
        """Whether a gate or the MLP reads the combined branches."""
        return self.has_gate or self.mlp_input == "branches"

    @property
    def has_gate(self) -> bool:
        """Whether a learned gate weighs the branches."""
        return self.branch_mix in ("gate", "gated_sum")

    @property
    def projects_mix(self) -> bool:
        """Whether the mix passes a projection of the block before it is added to the residual stream."""
        return self.branch_mix not in ("gated_sum", "sum")

    @property
    def sums_branches(self) -> bool:
        """Whether only the sum of the branches is read, as long as no branch is dropped or measured."""
        return self.branch_mix == "sum" and not self.branch_norm and not self.reads_alignment

    @property
    def attention_head_dim(self) -> int:
        """Channels of one attention head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads, local and global together."""
        return self.num_kv_heads or self.num_heads

    @property
    def local_heads(self) -> int:
        """Number of local query heads (they see a window); they come first."""
        return self.num_heads - self.global_heads

    @property
    def local_kv_heads(self) -> int:
        """Number of key/value heads of the local query heads; they come first."""
        return self.local_heads * self.kv_heads // self.num_heads

    @property
    def global_kv_heads(self) -> int:
        """Number of key/value heads of the global query heads."""
        return self.kv_heads - self.local_kv_heads

    @property
    def d_inner(self) -> int:
        """Inner width of the Mamba-2 mixer."""
        if self.mamba.num_heads is not None:
            return self.mamba.num_heads * self.mamba.head_dim
        return self.mamba.expand * self.hidden_size

    @property
    def mamba_heads(self) -> int:
        """Number of state space heads."""
        return self.d_inner // self.mamba.head_dim

    @property
    def mlp_size(self) -> int:
        """Inner width of the MLP."""
        return int(self.mlp_ratio * self.hidden_size)

    def of_layer(self, layer: int) -> ModelConfig:
        """Return the configuration with the sizes of ``layer``, for the parts of the layer to read."""
        return self.of_letter(self.pattern[layer]) if self.letter_sizes else self

    def of_letter(self, letter: str) -> ModelConfig:
        """Return the configuration with the sizes of the layers of ``letter``, and without sizes of letters."""
        sizes = (self.letter_sizes or {}).get(letter, LetterSizes())
        mamba = {"num_heads": sizes.mamba_heads, "n_groups": sizes.mamba_groups, "norm_groups": sizes.mamba_norm_groups}
        changed: dict[str, Any] = {
            "head_dim": self.attention_head_dim,
            "num_heads": sizes.num_heads,
            "num_kv_heads": sizes.num_kv_heads,
            "global_heads": sizes.global_heads,
            "mamba": self.mamba.model_copy(update={key: size for key, size in mamba.items() if size is not None}),
        }
        if sizes.window_size is not None:
            changed |= {"window_size": sizes.window_size, "attention_type": "local_global"}
        if sizes.mlp_size is not None:
            changed["mlp_ratio"] = (sizes.mlp_size + 0.5) / self.hidden_size  # mlp_size rounds down
        changed = {key: size for key, size in changed.items() if size is not None}
        return self.model_copy(update={**changed, "letter_sizes": None})

    def kinds(self) -> dict[str, int]:
        """Return the letters of ``pattern``, each with its first layer; its layers have equal mixers and sizes."""
        first: dict[str, int] = {}
        for layer, letter in enumerate(self.pattern):
            first.setdefault(letter, layer)
        return first

    def window_of_layer(self, layer: int) -> int:
        """Tokens that a local head of ``layer`` sees, including the query's token."""
        if self.letter_sizes:
            return self.of_layer(layer).window_of_layer(layer)
        if self.attention_type == "local_global" or self.num_layers == 1:
            return self.window_size
        last = self.window_size_last or self.max_position_embeddings
        return round(self.window_size + (last - self.window_size) * layer / (self.num_layers - 1))

    @model_validator(mode="before")
    @classmethod
    def _complete_mixers(cls, values: Any) -> Any:
        """Validate the settings of mixers that plugins add by their own sections, and add those left out.

        Raises:
            ValueError: a mixer is unknown, has no settings, or its settings are wrong.
        """
        if not isinstance(values, dict):
            return values
        given, letters = values.get("mixers") or {}, values.get("letters") or {}
        if not isinstance(given, dict) or not isinstance(letters, dict):
            return values
        named = [name for names in letters.values() if isinstance(names, list) for name in names]
        if not all(isinstance(name, str) for name in named):
            return values
        sections = {}
        for name in dict.fromkeys([*given, *named]):
            section = None if name in LETTERS["F"] else mixer_class(name).settings
            if section is not None:
                sections[name] = validated(section, given.get(name) or {}, f"mixers.{name}")
            elif name in given:
                raise ValueError(f"mixers.{name}: mixer {name} has no settings here; remove them")
        return {**values, "mixers": sections} if sections else values

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_model(self, built_in=LETTERS)
        # The sizes of the built-in mixers are checked by then, without torch.
        for name in dict.fromkeys(name for names in self.branches for name in names if name not in LETTERS["F"]):
            for problem in mixer_class(name).size_problems(self):
                raise ValueError(f"mixer {name}: {problem}")
        return self
