"""From configuration to a ready engine."""

from __future__ import annotations

from torch import nn

from fusiontree.engines.base import Engine
from fusiontree.engines.mixed_precision import compute_in
from fusiontree.engines.torch_engine import PRECISION, TorchEngine
from fusiontree.models.config import ModelConfig
from fusiontree.parallel.activation_checkpointing import checkpoint_activations, fuse_projections
from fusiontree.parallel.config import ParallelConfig
from fusiontree.parallel.layout import Layout
from fusiontree.parallel.shard_groups import build_model, materializer, no_weight_decay, shard_groups_leaves_first
from fusiontree.training.config import TrainingConfig

ZERO_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


def build_engine(
    model_config: ModelConfig, parallel: ParallelConfig, training: TrainingConfig, layout: Layout
) -> Engine:
    """Return the configured engine with a freshly initialised model.

    Args:
        model_config: the ``model`` section.
        parallel: the ``parallel`` section.
        training: the ``training`` section.
        layout: this process's place.
    """
    model = build_model(model_config, layout)
    materialize = materializer(model_config, training.seed, layout.device, model.specs)

    def decays(name: str, parameter: nn.Parameter) -> bool:
        return not no_weight_decay(name, model_config)

    stage = ZERO_STAGES.get(parallel.engine)
    if stage in (1, 2):
        compute_in(PRECISION[training.precision], shard_groups_leaves_first(model))
    checkpoint_activations(model.module, training.activation_checkpointing, training.recompute_layers)
    if stage not in (1, 2):  # whose forwards read cast copies of the parameters
        fuse_projections(model.module)
    if stage:
        from fusiontree.engines.zero.engine import ZeroEngine

        return ZeroEngine(
            model,
            layout,
            stage=stage,
            materialize=materialize,
            decays=decays,
            compute_dtype=PRECISION[training.precision],
            training=training,
            parallel=parallel,
        )
    return TorchEngine(
        model,
        layout,
        materialize=materialize,
        decays=decays,
        training=training,
        shard=parallel.engine == "fsdp2",
        reshard_after_forward=parallel.reshard_after_forward,
    )
