"""Calling the model on a micro batch, the same under every engine."""

from __future__ import annotations

from typing import Any

from fusiontree.engines.base import StepInputs, StepOutputs
from fusiontree.parallel.batch_sharding import shard_inputs, sum_over_row
from fusiontree.parallel.layout import Layout


def run_model(module: Any, inputs: StepInputs, layout: Layout) -> StepOutputs:
    """Bring this rank's part of ``inputs`` to its device, run the model, and return what the loss is made of."""
    output = module(**shard_inputs(*inputs, layout=layout))
    gate_sum_LB, entropy_sum_LB, square_sum_LB, count_B = sum_over_row(output.gates, layout)
    return StepOutputs(
        loss_sum=output.loss_sum,
        z_sum=output.z_sum,
        gate_sum_LB=gate_sum_LB,
        square_sum_LB=square_sum_LB,
        entropy_sum_LB=entropy_sum_LB,
        count_B=count_B,
        row_weight_B=inputs.row_weight_B.to(layout.device, non_blocking=True),
    )
