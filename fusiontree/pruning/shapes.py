"""What a pruned model keeps, and the configuration that describes it.

Units are the parts that are kept or removed as a whole: a key/value head with its query heads (local or global), a
state space unit, and a channel of the MLP. A state space unit is a group of heads with its B and C; where all heads
share one B and C, it is one head of every channel group of the gated norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fusiontree.models.config import LETTERS, ModelConfig
from fusiontree.utils.errors import UserError

KINDS = ("local", "global", "mamba", "mlp")
"""Kinds of units."""
BRANCH_OF = {"local": "attention", "global": "attention", "mamba": "mamba2"}
"""Mixer that a kind of unit is part of."""


@dataclass(frozen=True)
class KeptLayer:
    """A layer of the pruned model."""

    layer: int
    """Index of the layer in the source."""
    branches: tuple[str, ...]
    """Names of the mixers that are kept."""
    units: dict[str, tuple[int, ...]]
    """Units kept of each kind, ascending."""


def mamba_units(config: ModelConfig) -> int:
    """Return the number of state space units of a layer, whose sizes ``config`` has; 1 if heads cannot be removed."""
    sizes, heads = config.mamba, config.mamba_heads
    if sizes.n_groups > 1:
        return sizes.n_groups if sizes.norm_groups in (1, sizes.n_groups) else 1
    return 1 if heads % sizes.norm_groups else heads // sizes.norm_groups


def unit_counts(config: ModelConfig, layer: int) -> dict[str, int]:
    """Return the number of units of each kind in a layer; 0 for the kinds of mixers that it does not have."""
    sized, names = config.of_layer(layer), config.branches[layer]
    counts = {
        "local": sized.local_kv_heads,
        "global": sized.global_kv_heads,
        "mamba": mamba_units(sized),
        "mlp": sized.mlp_size,
    }
    return {kind: count if BRANCH_OF.get(kind) in (None, *names) else 0 for kind, count in counts.items()}


def everything(config: ModelConfig) -> list[KeptLayer]:
    """Return the plan that keeps everything."""
    return [
        KeptLayer(layer, names, {kind: tuple(range(count)) for kind, count in unit_counts(config, layer).items()})
        for layer, names in enumerate(config.branches)
    ]


def mamba_heads_of(config: ModelConfig, units: Sequence[int]) -> list[int]:
    """Return the state space heads of the given units, ascending; ``config`` has the sizes of the layer."""
    sizes, heads = config.mamba, config.mamba_heads
    count = mamba_units(config)
    if count == 1:
        return list(range(heads)) if units else []
    if sizes.n_groups > 1:
        size = heads // sizes.n_groups
        return [unit * size + head for unit in units for head in range(size)]
    return [group * count + unit for group in range(sizes.norm_groups) for unit in units]


def layer_sizes(config: ModelConfig, kept: KeptLayer) -> dict[str, int]:
    """Return the sizes of a kept layer, as in ``model.letter_sizes``."""
    sized = config.of_layer(kept.layer)
    found = {"mlp_size": len(kept.units["mlp"])}
    if "attention" in kept.branches:
        group = sized.num_heads // sized.kv_heads
        local, everywhere = len(kept.units["local"]), len(kept.units["global"])
        found |= {"num_heads": (local + everywhere) * group, "num_kv_heads": local + everywhere}
        found["global_heads"] = everywhere * group
        if config.attention_type == "pyramidal" or sized.window_size != config.window_size:
            found["window_size"] = config.window_of_layer(kept.layer)  # depth decides it only in the source
    if "mamba2" in kept.branches:
        units, sizes = len(kept.units["mamba"]), sized.mamba
        found["mamba_heads"] = len(mamba_heads_of(sized, kept.units["mamba"]))
        by_group = sizes.n_groups > 1 and mamba_units(sized) > 1
        found["mamba_groups"] = units if by_group else sizes.n_groups
        found["mamba_norm_groups"] = units if by_group and sizes.norm_groups > 1 else sizes.norm_groups
    return found


def pruned_config(config: ModelConfig, plan: Sequence[KeptLayer]) -> ModelConfig:
    """Return the configuration of the pruned model.

    Layers of equal mixers and sizes share a letter: F, M or A if the sizes are the model's, else a new letter.

    Raises:
        UserError: no layer is kept.
    """
    if not plan:
        raise UserError("the plan keeps no layer; choose a larger --target")
    values = config.model_dump(mode="json")
    model = _model_sizes(config)
    known: dict[tuple[Any, ...], str] = {(names, ()): letter for letter, names in LETTERS.items()}
    fresh = _fresh_letters()
    pattern, letters, sizes = "", {}, {}
    for kept in plan:
        own = {name: size for name, size in layer_sizes(config, kept).items() if size != model.get(name)}
        key = (kept.branches, tuple(own.items()))
        if key not in known:
            letter = known[key] = next(fresh)
            letters[letter] = list(kept.branches)
            if own:
                sizes[letter] = own
        pattern += known[key]
    values |= {"num_layers": len(plan), "layer_pattern": pattern}
    values |= {"letters": letters or None, "letter_sizes": sizes or None, "head_dim": config.attention_head_dim}
    return ModelConfig.model_validate(values)


def _model_sizes(config: ModelConfig) -> dict[str, int]:
    return {
        "num_heads": config.num_heads,
        "num_kv_heads": config.kv_heads,
        "global_heads": config.global_heads,
        "mamba_heads": config.mamba_heads,
        "mamba_groups": config.mamba.n_groups,
        "mamba_norm_groups": config.mamba.norm_groups,
        "mlp_size": config.mlp_size,
    }


def _fresh_letters() -> Iterator[str]:
    """Yield characters that can be letters of layers: a, b, … Z without F, M and A, then those of other alphabets."""
    ascii_letters = [chr(code) for code in (*range(97, 123), *range(65, 91))]
    yield from (letter for letter in ascii_letters if letter not in LETTERS)
    yield from (chr(code) for code in range(0x391, 0x10000) if chr(code).isalpha())
