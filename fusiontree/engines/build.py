"""From configuration to a ready engine."""

from __future__ import annotations

from torch import nn

from fusiontree.engines.base import Engine
from fusiontree.engines.common import PRECISION
from fusiontree.engines.config import ENGINES
from fusiontree.engines.mixed_precision import compute_in
from fusiontree.models.config import ModelConfig
from fusiontree.models.initialization import no_weight_decay
from fusiontree.parallel.activation_checkpointing import checkpoint_activations, fuse_projections
from fusiontree.parallel.auto_checkpointing import choose_automatically
from fusiontree.parallel.config import ParallelConfig
from fusiontree.parallel.fp8 import check_device, use_fp8
from fusiontree.parallel.layout import Layout
from fusiontree.parallel.shard_groups import build_model, materializer, shard_groups_leaves_first
from fusiontree.training.config import TrainingConfig


def build_engine(
    model_config: ModelConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
    layout: Layout,
) -> Engine:
    """Return the configured engine with a freshly initialised model.

    Args:
        model_config: the ``model`` section.
        parallel: the ``parallel`` section.
        training: the ``training`` section.
        layout: this process among all.

    Raises:
        UserError: the GPU has no FP8 products, or a mixer does not support them.
    """
    model = build_model(model_config, layout)
    if training.matmul_precision == "fp8":
        check_device(layout.device, announce=layout.is_main)
        use_fp8(model.module, training.fp8)
    materialize = materializer(model_config, training.seed, layout.device, model.specs)

    def decays(name: str, parameter: nn.Parameter) -> bool:
        return not no_weight_decay(name, model_config)

    spec = ENGINES.get(parallel.engine)
    if spec.casts_parameters:
        compute_in(PRECISION[training.precision], shard_groups_leaves_first(model))
    mode = training.activation_checkpointing
    checkpointing = checkpoint_activations(model.module, mode, training.recompute_layers)
    if mode == "auto":
        checkpointing = choose_automatically(checkpointing, model_config, training, layout)
    if not spec.casts_parameters:
        fuse_projections(model.module)
    engine = spec.build(model, layout, materialize=materialize, decays=decays, parallel=parallel, training=training)
    engine.checkpointing = checkpointing
    return engine
