"""From configuration to a ready engine."""

from __future__ import annotations

from typing import Any

from fusiontree.engines.base import Engine, OptimizerSettings
from fusiontree.engines.fsdp2 import FSDP2Engine
from fusiontree.engines.one_rank import OneRankEngine
from fusiontree.parallel.layout import Layout
from fusiontree.parallel.recomputation import checkpoint_activations, join_products
from fusiontree.parallel.units import build_model, materializer, no_weight_decay


def build_engine(model_config: Any, parallel: Any, training: Any, layout: Layout) -> Engine:
    """Return the configured engine with a freshly initialised model.

    Args:
        model_config: the ``model`` section.
        parallel: the ``parallel`` section.
        training: the ``training`` section.
        layout: this process's place.
    """
    model = build_model(model_config, layout)
    checkpoint_activations(model.module, training.activation_checkpointing, training.checkpointed_layers)
    join_products(model.module)
    engine = OneRankEngine if layout.place.world_size == 1 else FSDP2Engine
    return engine(
        model,
        layout,
        materialize=materializer(model_config, training.seed, layout.device, model.specs),
        decays=lambda name, parameter: not no_weight_decay(name, parameter),
        precision=training.precision,
        optimizer=OptimizerSettings(
            beta1=training.adam_beta1,
            beta2=training.adam_beta2,
            eps=training.adam_eps,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
        ),
        shard=parallel.engine == "fsdp2",
    )
