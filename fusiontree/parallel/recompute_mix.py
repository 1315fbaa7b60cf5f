"""Chooses how each layer recomputes its activations: the least added time whose kept bytes fit a budget.

Pure arithmetic. ``training.activation_checkpointing: auto`` calls it with measured bytes, the planner with estimated
bytes. Unit of time: seconds of one H100 in bf16; only the ratios of times decide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fusiontree.models.config import ModelConfig
from fusiontree.models.flops import matrix_parameters_by_layer
from fusiontree.models.mixers import layer_mixers
from fusiontree.models.mixers.base import Seconds

MODES = ("full", "selective", "none")
"""The modes that ``auto`` chooses from: fewer kept bytes first, less recomputation last."""
MATRIX_FLOPS = 727e12
"""Rate of matrix products in a profiled step of hybrid_1b_32k (docs/speed.md): 396 ms for 288 TFLOP."""
FP8_RATE = 1.5
"""Rate of products in FP8, with the casts of their factors, over that in bf16. An assumption: no profiled step yet."""
CHEAP_S = 3 / 2.7e12
"""Seconds per byte to recompute a cheap result: two reads and one write, at the rate at which memory is read."""


class LayerCosts(NamedTuple):
    """What a layer costs under each mode, on one rank and for one micro-batch."""

    nbytes: Mapping[str, float]
    """Bytes that the forward pass keeps for the backward pass."""
    seconds: Mapping[str, float]
    """Time that recomputation adds."""


def layer_costs(nbytes: Mapping[str, float], seconds: Seconds, tokens: float) -> LayerCosts:
    """Return the costs of a layer.

    Args:
        nbytes: kept bytes by mode.
        seconds: of the layer per token; recomputing the forward takes a third of what is repeated.
        tokens: of the micro-batch, on one rank.
    """
    cheap_s = CHEAP_S * max(0.0, nbytes["none"] - nbytes["selective"])
    return LayerCosts(nbytes, {"none": 0.0, "selective": cheap_s, "full": tokens * seconds.repeated / 3 + cheap_s})


def seconds_by_layer(model: ModelConfig, length: int, fp8: Sequence[int] | None = None) -> list[Seconds]:
    """Return the time of each layer's matrix products and mixers per token, forward and backward, tp = 1.

    Args:
        model: the ``model`` section.
        length: tokens of a row, which is one document.
        fp8: for each layer, the number of parameters whose products are computed in FP8; None: all are in bf16.
    """
    found = []
    for layer, parameters in enumerate(matrix_parameters_by_layer(model)):
        saved = (1 - 1 / FP8_RATE) * fp8[layer] if fp8 else 0.0
        kept, repeated = 0.0, 6.0 * (parameters - saved) / MATRIX_FLOPS
        sized = model.of_layer(layer)
        for mixer in layer_mixers(model, layer):
            seconds = mixer.seconds(sized, layer, length)
            if seconds is None:
                seconds = Seconds(0.0, 3.0 * mixer.flops(sized, layer, [length]) / MATRIX_FLOPS)
            kept, repeated = kept + seconds.kept, repeated + seconds.repeated
        found.append(Seconds(kept, repeated))
    return found


def modes_by_layer(mode: str, recomputed: int | None, layers: int) -> list[str]:
    """Return the mode of each layer under a setting other than ``auto``.

    Args:
        mode: none, selective, full or offload; ``auto`` begins as full.
        recomputed: ``training.recompute_layers``: the first layers, which use ``mode``; None means all.
        layers: number of layers.
    """
    mode, recomputed = ("full", None) if mode == "auto" else (mode, recomputed)
    first = layers if recomputed is None else min(recomputed, layers)
    return [mode] * first + ["selective" if mode in ("full", "offload") else "none"] * (layers - first)


def choose_mix(layers: Sequence[LayerCosts], spare: float) -> list[str]:
    """Return a mode of ``MODES`` per layer, such that the layers keep at most ``spare`` bytes more than under full.

    Greedy: starts from full everywhere, and repeatedly changes the layer and mode that save the most time per added
    byte, as long as a change fits. Layers of equal costs change from the last to the first, because the backward pass
    frees the last layers first. For layers of equal costs the added time exceeds the least possible time by less than
    one layer's recomputation.

    Args:
        layers: costs of each layer.
        spare: bytes; not negative.
    """
    modes = ["full"] * len(layers)
    while True:
        best: tuple[float, int, str, float] | None = None
        for index, (costs, now) in enumerate(zip(layers, modes, strict=True)):
            for then in MODES:
                saved = costs.seconds[now] - costs.seconds[then]
                added = costs.nbytes[then] - costs.nbytes[now]
                if saved > 0 and added <= spare:
                    best = max(best or (0.0, -1, "", 0.0), (saved / max(added, 1.0), index, then, added))
        if best is None:
            return modes
        _, index, modes[best[1]], added = best
        spare -= added


def added_bytes(layers: Sequence[LayerCosts], modes: Sequence[str]) -> float:
    """Return the bytes that ``modes`` keep beyond mode full everywhere."""
    return sum(costs.nbytes[mode] - costs.nbytes["full"] for costs, mode in zip(layers, modes, strict=True))


def peak_bytes(nbytes: Sequence[Mapping[str, float]], modes: Sequence[str]) -> float:
    """Return the most bytes at one time of what layers keep and of what the backward pass of a block recomputes.

    The backward pass of a layer begins when later layers are freed. A layer that is recomputed in full then needs the
    bytes of ``none``; selective recomputation frees each result after its use.
    """
    kept = [sizes[mode] for sizes, mode in zip(nbytes, modes, strict=True)]
    before, most = 0.0, sum(kept)
    for sizes, mode, own in zip(nbytes, modes, kept, strict=True):
        if mode in ("full", "offload"):
            most = max(most, before + sizes["none"])
        before += own
    return most


def describe_mix(modes: Sequence[str]) -> str:
    """Return the number of layers of each mode, such as ``full in 12 layers, selective in 8``."""
    counts = Counter(modes)
    known = [mode for mode in ("offload", *MODES) if counts[mode]]
    first = f"{known[0]} in {counts[known[0]]} layer{'s' if counts[known[0]] > 1 else ''}" if known else "no layers"
    return ", ".join([first, *(f"{mode} in {counts[mode]}" for mode in known[1:])])
