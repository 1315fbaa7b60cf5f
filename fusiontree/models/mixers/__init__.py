"""Mixers by name. Importing this package needs no torch; the built-in mixers are imported when one is looked up."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fusiontree.utils.registry import Registry

if TYPE_CHECKING:
    from fusiontree.models.config import ModelConfig
    from fusiontree.models.mixers.base import Mixer

MIXERS: Registry[type[Mixer]] = Registry("mixer")

_WEIGHT = re.compile(r"layers\.(\d+)\.(\w+)\.(.+)")


def mixer_class(name: str) -> type[Mixer]:
    """Return the class of a mixer.

    Raises:
        UserError: no mixer has this name.
    """
    import fusiontree.models.mixers.attention
    import fusiontree.models.mixers.gated_delta_net
    import fusiontree.models.mixers.mamba2  # noqa: F401  they register themselves

    return MIXERS.get(name)


def layer_mixers(config: ModelConfig, layer: int) -> list[type[Mixer]]:
    """Return the classes of a layer's mixers, in the order of its branches."""
    return [mixer_class(name) for name in config.branches[layer]]


def all_mixers(config: ModelConfig) -> Iterator[tuple[int, type[Mixer]]]:
    """Yield each branch of the model: its layer and the class of its mixer."""
    for layer in range(config.num_layers):
        for mixer in layer_mixers(config, layer):
            yield layer, mixer


def distinct_mixers(config: ModelConfig) -> list[type[Mixer]]:
    """Return the classes of the model's mixers, each once."""
    return list(dict.fromkeys(mixer for _, mixer in all_mixers(config)))


def config_of(name: str, config: ModelConfig) -> ModelConfig:
    """Return the configuration with the sizes of the layer that a parameter is in."""
    match = _WEIGHT.fullmatch(name)
    return config if match is None else config.of_layer(int(match[1]))


def mixer_of(name: str, config: ModelConfig) -> tuple[type[Mixer], str] | None:
    """Return the mixer that owns a parameter and the parameter's name inside the mixer; None if no mixer owns it.

    ``layers.3.mamba.in_proj.weight`` belongs to Mamba-2, where it is ``in_proj.weight``.
    """
    match = _WEIGHT.fullmatch(name)
    if match is None or int(match[1]) >= config.num_layers:
        return None
    owners = [mixer for mixer in layer_mixers(config, int(match[1])) if mixer.module_name == match[2]]
    return (owners[0], match[3]) if owners else None
