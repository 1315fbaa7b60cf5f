"""From configuration to a ready engine."""

from __future__ import annotations

from typing import Any

from torch import nn

from fusiontree.engines.base import Engine, OptimizerSettings
from fusiontree.engines.casting import compute_in
from fusiontree.engines.fsdp2 import PRECISION, FSDP2Engine
from fusiontree.parallel.layout import Layout
from fusiontree.parallel.recomputation import checkpoint_activations, join_products
from fusiontree.parallel.units import build_model, materializer, no_weight_decay, units_inside_out

ZERO_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


def build_engine(model_config: Any, parallel: Any, training: Any, layout: Layout) -> Engine:
    """Return the configured engine with a freshly initialised model.

    Args:
        model_config: the ``model`` section.
        parallel: the ``parallel`` section.
        training: the ``training`` section.
        layout: this process's place.
    """
    model = build_model(model_config, layout)
    materialize = materializer(model_config, training.seed, layout.device, model.specs)
    optimizer = OptimizerSettings(
        beta1=training.adam_beta1,
        beta2=training.adam_beta2,
        eps=training.adam_eps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
    )

    def decays(name: str, parameter: nn.Parameter) -> bool:
        return not no_weight_decay(name, parameter)

    stage = ZERO_STAGES.get(parallel.engine)
    if stage in (1, 2):
        compute_in(PRECISION[training.precision], units_inside_out(model))
    checkpoint_activations(model.module, training.activation_checkpointing, training.checkpointed_layers)
    if stage not in (1, 2):  # whose forwards read cast copies of the parameters
        join_products(model.module)
    if stage:
        from fusiontree.engines.zero import ZeroEngine

        return ZeroEngine(
            model,
            layout,
            stage=stage,
            materialize=materialize,
            decays=decays,
            compute_dtype=PRECISION[training.precision],
            optimizer=optimizer,
            offload=parallel.offload,
            keep_below=parallel.keep_below,
        )
    return FSDP2Engine(
        model,
        layout,
        materialize=materialize,
        decays=decays,
        precision=training.precision,
        optimizer=optimizer,
        shard=parallel.engine == "fsdp2",
        reshard_after_forward=parallel.reshard_after_forward,
    )
