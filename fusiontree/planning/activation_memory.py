"""Estimates the activations that one rank keeps for the backward pass, and which layers recompute theirs.

Unit: elements of one token on one rank, unless a name says bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from fusiontree.models.config import ModelConfig
from fusiontree.models.mixers import layer_mixers
from fusiontree.models.mixers.base import Seconds
from fusiontree.parallel.recompute_mix import added_bytes, choose_mix, layer_costs, modes_by_layer, peak_bytes
from fusiontree.training.config import TrainingConfig

LOSS_TOKENS = 8192
"""Tokens whose logits, and their gradient, exist at one time."""
PASSING_WIDTHS = 10
"""Gradients inside the block at work, in widths of the residual stream; fitted to measured peaks."""


def kept_elements(model: ModelConfig, layer: int, mode: str, tp: int) -> float:
    """Return the elements that a layer keeps per token for its backward pass, on one rank of tp."""
    hidden, model = model.hidden_size, model.of_layer(layer)
    between = hidden / tp  # the residual stream between the mixers is split over tp
    if mode == "offload":
        return 0.0
    if mode == "full":
        return between
    mixers = [mixer.activations(model, tp) for mixer in layer_mixers(model, layer)]
    products = sum(mixer.expensive + between for mixer in mixers)
    rest = sum(mixer.cheap for mixer in mixers)
    if model.use_alignment:
        products += 3 * between
        rest += between
    if model.has_gate:
        products += (model.gate_rank + hidden) / tp
    products += model.mlp_size / tp  # terms only added to the residual are not kept
    rest += hidden + model.mlp_size / tp  # the gathered input of the branches, the MLP's GELU
    if model.branch_mix in ("gate", "mean"):
        rest += between  # the mixture, input of a projection
    if model.branch_norm:
        rest += len(mixers) * between
    if model.mlp_input == "residual":
        products += between  # the residual stream, input of the MLP's norm
        rest += between
    return between + products + (rest if mode == "none" else 0.0)


def recomputation(
    model: ModelConfig,
    training: TrainingConfig,
    seconds: Sequence[Seconds],
    tokens: float,
    tp: int,
    half: int,
    budget: float,
) -> tuple[list[str], float]:
    """Return each layer's mode and the bytes of activations of a micro-batch, ``tokens`` of which are the rank's own.

    Under ``auto`` the modes are those that fill ``budget`` bytes, chosen in two rounds as at run time.
    """
    named = ("none", "selective", "full", "offload")
    nbytes = [
        {mode: half * tokens * kept_elements(model, layer, mode, tp) for mode in named}
        for layer in range(model.num_layers)
    ]
    passing = PASSING_WIDTHS * model.hidden_size * tokens + 2 * model.vocab_size * min(tokens, LOSS_TOKENS)
    beside = half * passing / tp
    modes = modes_by_layer(training.activation_checkpointing, training.recompute_layers, model.num_layers)
    if training.activation_checkpointing == "auto":
        layers = [layer_costs(sizes, its, tokens / tp) for sizes, its in zip(nbytes, seconds, strict=True)]
        for _ in range(2):
            base = beside + peak_bytes(nbytes, modes) - added_bytes(layers, modes)
            modes = choose_mix(layers, max(0.0, budget - base))
    return modes, beside + peak_bytes(nbytes, modes)
